"""What torch.export and Dynamo cannot trace, said in a way that they can, with the same meaning.

x.data                                       ->  x.detach()
F.pad(x, (0, 0))                             ->  x.clone()
x.type_as(other)                             ->  x.to(other.dtype): no value of `other` matters
torch._weight_norm(v, g, dim)                ->  v * (g / |v|)
sdpa(q, k, v, is_causal=T > 1)               ->  sdpa(q, k, v, is_causal=bool(T > 1))
torch.hstack([x, y])                         ->  torch.cat([x, y], 1), of vectors along 0
torch.take_along_dim(x, index, 1)            ->  x.gather(1, index), broadcast first
x.unbind(1)[-1]                              ->  x.select(1, -1), see `fxport.capture.lazy_parts`
torch._grouped_mm(x, w, ends)                ->  bmm(x[:, None], w[group of each row])[:, 0]
nn.TransformerEncoder(...)(x, mask=m)        ->  the same, without looking into m whether it is
                                                 causal: the layers get m itself
torch.vmap(head)(q, k)                       ->  a loop over the rows, stacked
x.data = y                                   ->  refused: a trace would go on with the old x
torch.arange(T).max().item()                 ->  T - 1, see `fxport.capture.counting`
f"{x.shape[1]}"                              ->  f"{int(x.shape[1])}": not the symbol's name

Dynamo is told of the encoder (and decoder) alone; the rest it traces, or says.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import transformer
from torch.overrides import TorchFunctionMode

from fxport.capture.counting import LargestCounted
from fxport.capture.lazy_parts import parts_when_asked
from fxport.capture.location import is_library, line_of_user
from fxport.capture.metadata import METADATA, asked_plainly
from fxport.capture.vmapped import vmap_as_loop
from fxport.capture.whole.tidy import NOTHING_ADDED
from fxport.errors import PortError, Reason, ReasonCode

__all__ = ["rephrase_for_dynamo", "rephrased"]


@contextmanager
def rephrased() -> Iterator[None]:
    """For the time of a trace."""
    detect, written = transformer._detect_is_causal_mask, torch.SymInt.__repr__
    transformer._detect_is_causal_mask = _as_stated
    attention = F.scaled_dot_product_attention

    def number(size: torch.SymInt) -> str:
        user = not is_library(sys._getframe(1).f_code.co_filename)
        return repr(int(size)) if user else written(size)

    @functools.wraps(attention)
    def said_causal(*args: Any, **kwargs: Any) -> Any:
        # Torch's own parser refuses such an argument before any mode sees the call.
        args = tuple(bool(a) if isinstance(a, torch.SymBool) else a for a in args)
        kwargs = {k: bool(a) if isinstance(a, torch.SymBool) else a for k, a in kwargs.items()}
        return attention(*args, **kwargs)

    torch.SymInt.__repr__ = number  # type: ignore[method-assign]
    F.scaled_dot_product_attention = said_causal
    try:
        with LargestCounted(), _Rephrase(), vmap_as_loop():
            yield
    finally:
        transformer._detect_is_causal_mask = detect
        torch.SymInt.__repr__ = written  # type: ignore[method-assign]
        F.scaled_dot_product_attention = attention


def _as_stated(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """Torch compares values to save work; what the mask is gets proven later, from the graph."""
    return is_causal is True


def rephrase_for_dynamo() -> None:
    """For every later trace of Dynamo's in this process, whatever its backend.

    It would break the graph where values are compared, and what follows, torch's own layers, is
    no code that it compiles by itself: attention would stay as it is, and nobody would be told.
    """
    with suppress(ValueError):  # somebody has told it already
        torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask)(_as_stated)


class _Rephrase(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in METADATA and not types:
            return asked_plainly(func, args, kwargs)
        kwargs = kwargs or {}
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0].detach()  # the same memory; export would not know where it comes from
        if func == Tensor.data.__set__ and not _same_memory(*args):  # type: ignore[attr-defined]
            raise PortError([_replaced()])
        if func is F.pad and _adds_nothing(kwargs["pad"] if "pad" in kwargs else args[1]):
            with fx_traceback.annotate({NOTHING_ADDED: True}):
                return args[0].clone()  # torch would take every size of x for a constant
        if func is Tensor.type_as:
            return _cast_as(func, *args, **kwargs)
        if func is torch._weight_norm:
            return _normed(*args, **kwargs)
        if func is torch.hstack and not kwargs and all(t.dim() for t in args[0]):
            return torch.cat(list(args[0]), 0 if args[0][0].dim() == 1 else 1)
        if func in (torch.take_along_dim, Tensor.take_along_dim):
            return _taken_along(*args, **kwargs)
        if func is torch._grouped_mm:
            return _grouped(func, *args, **kwargs)
        parts = parts_when_asked(func, args, kwargs)
        return func(*args, **kwargs) if parts is None else parts


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is given what it has, as ``module.to(device)`` does."""
    alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    pointers = (one.untyped_storage()._cdata, other.untyped_storage()._cdata)
    return alike and pointers[0] == pointers[1] and one.storage_offset() == other.storage_offset()


def _replaced() -> Reason:
    return Reason(
        ReasonCode.CAPTURE_FAILED,
        "forward gives a tensor other memory by its `data`",
        line_of_user(sys._getframe()),
        "assign to the name: x = y",
    )


def _cast_as(func: Callable[..., Any], value: Tensor, other: Tensor) -> Any:
    return value.to(other.dtype) if value.device == other.device else func(value, other)


def _normed(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`nn.utils.weight_norm` and its parametrization; `dim` -1 is the norm of all of `v`."""
    others = None if dim == -1 else [d for d in range(v.dim()) if d != dim]
    return v * (g / torch.linalg.vector_norm(v, 2, others, keepdim=dim != -1))


def _taken_along(input: Tensor, indices: Tensor, dim: int | None = None) -> Tensor:
    """Torch asks whether symbolic sizes are equal, and gets an answer for the sizes at hand."""
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    if input.dim() != indices.dim():
        return torch.ops.aten.take_along_dim.default(input, indices, dim)  # it says what is wrong
    dim %= input.dim()
    shapes = [[*t.shape[:dim], 1, *t.shape[dim + 1 :]] for t in (input, indices)]
    shape = list(torch.broadcast_shapes(*shapes))
    sizes = [[*shape[:dim], t.shape[dim], *shape[dim + 1 :]] for t in (input, indices)]
    return input.expand(sizes[0]).gather(dim, indices.expand(sizes[1]))


def _grouped(
    func: Callable[..., Any],
    one: Tensor,
    other: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Torch knows the shape in bfloat16 alone, and computes float32, too."""
    if bias is not None or out_dtype not in (None, one.dtype):
        return func(one, other, offs, bias, out_dtype)
    if offs is None and one.dim() == other.dim() == 3:
        return torch.bmm(one, other)
    if offs is None or one.dim() != 2 or other.dim() != 3:
        return func(one, other, offs, bias, out_dtype)
    rows = torch.arange(one.shape[0], device=one.device, dtype=offs.dtype)
    groups = torch.searchsorted(offs, rows, right=True)
    return torch.bmm(one.unsqueeze(1), other[groups]).squeeze(1)


def _adds_nothing(pad: Sequence[Any]) -> bool:
    return all(isinstance(size, int) and size == 0 for size in pad)
