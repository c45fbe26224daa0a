"""Mixtures of experts: each expert on the rows that chose it.

`products` takes weights that are looked up for each row, `loops` a loop over experts, `lift` what
every expert of such a loop computes.
"""
