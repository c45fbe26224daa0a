"""A prepared launch hands a kernel what an unprepared one would; they are recorded, not run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from attention_cases import CASES, Arguments, Case, make
from torch import Tensor

pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor

from fxport.ops.params import AttentionParams
from fxport.ops.triton import attention as triton_attention
from fxport.ops.triton import launch as triton_launch
from fxport.ops.triton.call import INTERPRETED, launches_of

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter prepares nothing")

KERNELS = (
    *("forward_kernel", "delta_kernel", "query_kernel", "key_kernel"),
    *("bias_kernel", "exact_norm_kernel"),
)

# prepared or not, the kernel, its grid, its arguments
Records = list[tuple[bool, str, tuple[int, ...], dict[str, Any]]]


class _Recorder:
    """In place of a kernel; compiled, it is itself on another way."""

    records: ClassVar[Records] = []

    def __init__(self, kernel: Any) -> None:
        self.params = kernel.params
        self.__name__ = kernel.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(**arguments: Any) -> Any:
            names = [p.name for p in self.params]
            assert set(names) <= set(arguments)
            given = {name: _seen(arguments[name]) for name in names}
            self.records.append((False, self.__name__, (*grid, 1, 1)[:3], given))
            return _Compiled(self)

        return launch


class _Compiled:
    def __init__(self, kernel: _Recorder) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any) -> None:
            names = [p.name for p in self.kernel.params]
            given = dict(zip(names, map(_seen, arguments), strict=True))
            self.kernel.records.append((True, self.kernel.__name__, grid, given))

        return launch


def _seen(x: Any) -> Any:
    """What a kernel sees of an argument: of memory, what is in it."""
    if isinstance(x, Tensor):
        return "tensor", x.shape, x.stride(), x.dtype
    if isinstance(x, TensorDescriptor):
        rest = {**vars(x), "base": None}
        return "descriptor", _seen(x.base), x.base.data_ptr() % 16, rest
    return type(x), x


@pytest.fixture(autouse=True)
def _recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in KERNELS:
        monkeypatch.setattr(triton_attention, name, _Recorder(getattr(triton_attention, name)))
    monkeypatch.setattr(triton_launch, "CompiledKernel", _Compiled)
    launches_of.cache_clear()
    _Recorder.records.clear()
    yield
    launches_of.cache_clear()


def _both(
    arguments: Arguments,
    needs: tuple[bool, ...] | None = None,
    lse_gradient: bool = True,
    layout: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Records:
    """What forward and backward launch."""
    tensors = [None if x is None else layout(x.detach()) for x in arguments.tensors]
    given = [x is not None and x.is_floating_point() for x in tensors[:6]]
    wanted = tuple(n and g for n, g in zip(needs or (True,) * 6, given, strict=True))
    _Recorder.records.clear()
    out, lse = triton_attention.forward(*tensors, arguments.params)
    lse = torch.zeros_like(lse)
    grad_lse = torch.ones_like(lse) if lse_gradient else None
    triton_attention.backward(
        layout(torch.ones_like(out)), grad_lse, *tensors[:3], out, lse, *tensors[3:],
        arguments.params, wanted,
    )  # fmt: skip
    return list(_Recorder.records)


def _heads_last(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x


MORE = (
    Case("bias-whole", bias_shape=(2, 6, 37, 53)),
    Case("bias-one-batch", bias_shape=(1, 6, 37, 53)),
    Case("bias-per-row", bias_shape=(2, 6, 37, 1)),
    Case("bias-one-number", bias_shape=(1, 1, 1, 1)),
    Case("scale", params=AttentionParams(0.4)),
    Case("softcap-2", params=AttentionParams(0.3, softcap=2.0)),
    Case("softcap-3", params=AttentionParams(0.3, softcap=3.0)),
    Case("window-7", params=AttentionParams(0.3, True, window_left=7)),
    Case("window-9", params=AttentionParams(0.3, True, window_left=9)),
)


def test_prepared_launches_are_the_unprepared_ones() -> None:
    """All kinds in one process: none may be taken for another."""
    dtypes, layouts = (torch.float32, torch.float16), (Tensor.detach, _heads_last)
    calls = [
        (make(case, dtype, seed=1), None, lse_gradient, layout)
        for case, dtype, lse_gradient, layout in product(
            (*CASES, *MORE), dtypes, (False, True), layouts
        )
    ]
    everything = make(next(c for c in CASES if c.name == "everything"), torch.float32)
    for index in range(6):
        needs = tuple(i == index for i in range(6))
        calls.append((everything, needs, False, Tensor.detach))
    for call in calls:
        _both(*call)
    prepared = [_both(*call) for call in calls]
    for call, records in zip(calls, prepared, strict=True):
        launches_of.cache_clear()
        unprepared = _both(*call)
        assert all(record[0] for record in records)
        assert not any(record[0] for record in unprepared)
        assert [r[1:] for r in records] == [r[1:] for r in unprepared]


def test_a_bias_that_is_expanded_is_another_kind() -> None:
    """Laid out alike, but its gradient has a batch more, and nothing to add up."""
    case = Case("", bias_shape=(1, 6, 37, 53))
    arguments = make(case, torch.float32)
    bias = arguments.tensors[3]
    assert bias is not None
    tensors = list(arguments.tensors)
    tensors[3] = bias.detach().expand(2, -1, -1, -1)
    shared, expanded = _both(arguments), _both(replace(arguments, tensors=tuple(tensors)))
    assert [r[3]["served_batches"] for r in shared if r[1] == "bias_kernel"] == [(int, 2)]
    assert not [r for r in expanded if r[1] == "bias_kernel"]
    gradients = [r[3]["dbias_ptr"] for r in expanded if r[1] == "query_kernel"]
    assert [shape for _, shape, *_ in gradients] == [(2, 6, 37, 53)]


def test_tensors_off_the_alignment_are_launched_anew() -> None:
    """Triton compiles another kernel for them."""
    arguments = make(Case("", sinks=True), torch.float32)
    sinks = torch.zeros(7)[1:]
    assert sinks.data_ptr() % 16
    tensors = list(arguments.tensors)
    tensors[4] = sinks
    _both(arguments)
    records = _both(replace(arguments, tensors=tuple(tensors)))
    prepared = {name: was for was, name, *_ in records}
    assert not prepared["forward_kernel"] and prepared["query_kernel"]


def test_no_tensor_is_kept() -> None:
    q, k, v = (torch.zeros(1, 2, 5, 16) for _ in range(3))
    kept = weakref.ref(q)
    triton_attention.forward(q, k, v, None, None, None, None, None, AttentionParams(0.3))
    del q
    gc.collect()
    assert kept() is None


@dataclass
class _GluonDescriptor:
    """As Gluon's: not Triton's class, and with one attribute more."""

    base: Tensor
    layout: str


def test_descriptors_of_other_classes() -> None:
    first, second = torch.zeros(8), torch.ones(8)
    prepared = triton_launch._Prepared.of(
        _Compiled(
            _Recorder(SimpleNamespace(params=[SimpleNamespace(name="x_desc")], __name__="k"))
        ),
        (1,),
        ["x_desc"],
        {"x_desc": _GluonDescriptor(first, "swizzled")},
    )
    launched: list[Any] = []
    replace(prepared, run=launched.append)({"x_desc": second})
    assert type(launched[0]) is _GluonDescriptor
    assert launched[0].base is second
    assert launched[0].layout == "swizzled"
