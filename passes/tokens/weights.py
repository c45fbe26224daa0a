"""What is computed of weights alone needs no rule: no token flows in, so none is mixed.

    kron(a [8, 8], b [8, 8])                 [64, 64]    whatever `kron` does
    linear(x [B, T, 64], kron(a, b))         judged by the rule of `linear`

An operation is a function of its operands where it writes to nothing, draws no random numbers, and
the shape of what it gives does not hang on their values. Nothing that counts tokens may enter,
neither as a tensor along the tokens nor as a number.

Which ops are taken is a list all the same: a saved port is data from anywhere, and many ops of ATen
do not check what they are given, or leave memory as it was (``new_empty_strided``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxport.capture.arguments import shape_of
from fxport.passes.axes import Symbols, has_axis
from fxport.passes.constants import is_symbolic

__all__ = ["axes_of_weights", "is_function"]

_NOT_FUNCTIONS = (
    torch.Tag.nondeterministic_seeded,
    torch.Tag.dynamic_output_shape,
    torch.Tag.data_dependent_output,
    torch.Tag.maybe_aliasing_or_mutating,
    torch.Tag.generated,
)
_NAMES = frozenset(
    """
    addbmm addmv addr adjoint block_diag broadcast_tensors bucketize cdist chain_matmul cholesky
    cholesky_inverse cholesky_solve column_stack combinations corrcoef cov cross det diag diag_embed
    diagflat diagonal_copy diagonal_scatter diff dist dsplit dstack
    fake_quantize_per_channel_affine fake_quantize_per_channel_affine_cachemask
    fake_quantize_per_tensor_affine fake_quantize_per_tensor_affine_cachemask
    fft_fft fft_fft2 fft_fftn fft_fftshift fft_hfft fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn
    fliplr flipud frobenius_norm hsplit hstack index_add index_copy index_fill index_put inner
    inverse isclose isin kron linalg_cholesky linalg_cholesky_ex linalg_cond linalg_cross linalg_det
    linalg_diagonal linalg_eigh linalg_eigvalsh linalg_householder_product linalg_inv linalg_inv_ex
    linalg_ldl_factor linalg_ldl_solve linalg_lu linalg_lu_factor linalg_lu_solve linalg_matmul
    linalg_matrix_exp linalg_matrix_norm linalg_matrix_power linalg_matrix_rank linalg_multi_dot
    linalg_pinv linalg_qr linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular
    linalg_svd linalg_svdvals linalg_tensorinv linalg_tensorsolve linalg_vander linalg_vecdot
    logdet mH masked_scatter matrix_H matrix_exp matrix_power meshgrid mode moveaxis msort nanmean
    nanmedian nanquantile norm_except_dim nuclear_norm orgqr pairwise_distance pdist pinverse qr
    quantile renorm rot90 row_stack searchsorted select_scatter slice_scatter slogdet sum_to_size
    svd swapdims take take_along_dim trace trapezoid trapz triangular_solve unfold
    upsample_bicubic2d upsample_bilinear2d upsample_linear1d upsample_nearest1d vander vsplit vstack
    """.split()  # noqa: SIM905
)


def is_function(target: Any) -> bool:
    """Whether an op of ATen gives tensors that are a function of the tensors it is given.

    Of those without a rule, one that checks its operands, on every device.
    """
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    schema = target._schema
    known = schema.name.removeprefix("aten::") in _NAMES
    tags = target.tags
    given, made = ([str(a.type) for a in side] for side in (schema.arguments, schema.returns))
    takes = any(kind in ("Tensor", "List[Tensor]") for kind in given)
    gives = bool(made) and all(kind in ("Tensor", "List[Tensor]") for kind in made)
    pure = not schema.is_mutable and not any(tag in tags for tag in _NOT_FUNCTIONS)
    return known and takes and gives and pure


def axes_of_weights(node: fx.Node, axes: dict[fx.Node, Any], symbols: Symbols) -> Any:
    """Axes of what an op without a rule makes of weights alone; None where that is not proven."""
    value = node.meta.get("val")
    given = node.all_input_nodes
    if not is_function(node.target) or any(n not in axes or is_symbolic(n) for n in given):
        return None
    if any(map(has_axis, (dim for n in given for dim in _dims(n, axes)))):
        return None
    if isinstance(value, torch.Tensor):
        return _whole(shape_of(node), symbols)
    found = tuple(_whole(tuple(v.shape), symbols) for v in value or ())
    return found if found and None not in found else None


def _dims(node: fx.Node, axes: dict[fx.Node, Any]) -> Any:
    return axes[node] if isinstance(node.meta["val"], torch.Tensor) else sum(axes[node], ())


def _whole(shape: tuple[Any, ...], symbols: Symbols) -> Any:
    fixed = all(isinstance(size, int) for size in shape)
    return tuple(symbols.factor(size) for size in shape) if fixed else None
