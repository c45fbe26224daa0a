"""Kernels of our own in Triton: attention with everything that libraries lack, and experts.

`attention` and `experts` are what the ops call. `call` prepares one attention, `launch` lays a
kind of call down once, `config` holds the block shapes; `tiles`, `forward`, `backward` and `bias`
are the kernels. `gluon` decides which calls another forward kernel takes, `gluon_forward`. Nothing
here is imported where Triton is not.
"""
