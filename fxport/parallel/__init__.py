"""Tensor parallelism: the rank's context, the collectives and the plan."""
