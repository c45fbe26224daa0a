"""From a model, or from Dynamo's graph, to one ATen graph that holds for every length.

Two doors: `dynamo` (training, one node after the other) and `export` (serving). The second
first learns how the model is called (`conventions`, `adapt`, `layouts`, `losses`, `logits`), then
captures it with symbolic sizes (`symbolic`) or, where the code will not have that, at several
plain lengths (`lengths`, `sample`, `unify`); forward is not told that it is traced (`as_eager`).
Which lengths are enough is asked by `questions`, `walk`, `one` and `batches`; that earlier calls
do not matter is shown by `earlier_calls`, `written`, `caches` and `memos`; choices of tokens are
followed by `selections`, `rows` and `experts`.
"""
