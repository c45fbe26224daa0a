"""Tokens that forward sorts by their expert, captured without the sorting.

`sorts` sees the calls while forward is traced; `order` says what is computed in their place,
`rows`, `by_row`, `runs`, `counts` and `back` do so: rows taken, computed on, cut into runs,
counted, put back.
"""
