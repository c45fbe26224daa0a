"""Tensor parallelism from the dataflow: label, solve, emit, check."""
