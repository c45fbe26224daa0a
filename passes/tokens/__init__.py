"""Whether everything outside attention treats each token by itself.

`locality` is the analysis; `rules` says how each op carries the axes of its inputs (`rules_shape`
for ops that move values, `rules_compute` for those that compute), `call` is what a rule is given.
"""
