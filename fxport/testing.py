"""For tests: what was rewritten, that it computes the same, and that graphs stay as they were.

fxport.testing.assert_rewrites(model, inputs, attention=2)
fxport.testing.assert_same(model, torch.compile(model, backend="vllm_generic"), inputs)
fxport.testing.assert_golden(graph, "tests/golden/my_model.txt")   # pytest --fxport-accept
"""

from __future__ import annotations

import copy
import difflib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from fxport.diff.numbers import TOLERANCES, Difference, difference, magnitude
from fxport.errors import FxportError
from fxport.explain_records import Explanation
from fxport.fx_text import graph_text

__all__ = ["assert_golden", "assert_rewrites", "assert_same"]


def assert_rewrites(
    model: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    attention: int | None = None,
    left: int = 0,
    linear: Mapping[str, int] | None = None,
    graph_breaks: int = 0,
    kwargs: Mapping[str, Any] | None = None,
) -> Explanation:
    """Asserts how many attentions of one call ``backend="vllm_generic"`` rewrites.

    Args:
        model: a module or function; called once, in its mode, with `inputs` and `kwargs`.
        attention: attentions rewritten; None for any number.
        left: attentions left as they are.
        linear: sharding -> number of linears, e.g. ``{"column": 4, "row": 4}``.
        graph_breaks: breaks of torch.compile.

    Raises:
        AssertionError: other numbers; the text is the whole explanation.
        FxportError: `linear` is given and there is no tensor-parallel plan.
    """
    from fxport.explain_training import explain_training

    explanation = explain_training(model, inputs, kwargs or {})
    counted = {
        "attention": (len(explanation.rewritten), attention),
        "left": (len(explanation.left), left),
        "graph breaks": (len(explanation.graph_breaks), graph_breaks),
    }
    wrong = [
        f"{name}: {found}, expected {wanted}"
        for name, (found, wanted) in counted.items()
        if wanted is not None and found != wanted
    ]
    if linear is not None:
        shardings = _shardings(model)
        if shardings != dict(linear):
            wrong.append(f"linear: {shardings}, expected {dict(linear)}")
    if wrong:
        raise AssertionError("\n".join([*wrong, "", str(explanation)]))
    return explanation


def _shardings(model: Callable[..., Any]) -> dict[str, int]:
    """Sharding -> number of linears, from the tensor-parallel plan."""
    from fxport.explain_serving import explain_serving

    if not isinstance(model, nn.Module):
        raise FxportError(
            "assert_rewrites(linear=...) needs a module: a plan is made of parameters"
        )
    explanation = explain_serving(model)
    if explanation.linears is None:
        raise AssertionError(f"no tensor-parallel plan was made\n\n{explanation}")
    return dict(Counter(site.sharding for site in explanation.linears))


# --- numbers ----------------------------------------------------------------------------------


def assert_same(
    model: nn.Module,
    rewritten: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    grads: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
    dtype: torch.dtype | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Asserts that both give the same outputs and the same gradients.

    Gradients are those of all outputs, weighted randomly, with respect to every parameter and
    every floating point input. Neither `.grad` nor the random state is changed.

    Args:
        model: the original.
        rewritten: the same call. A module with parameters of the same names, or a function that
            uses the parameters of `model`.
        rtol, atol: equal when ``|a - b| <= atol + rtol * largest |a|``; by default by dtype.
        dtype: compute in copies of this dtype, e.g. ``torch.float64``; needs modules.

    Raises:
        AssertionError: names the tensor that is worst, with absolute, relative and ulp difference.
    """
    if dtype is not None:
        if not isinstance(rewritten, nn.Module):
            raise FxportError("assert_same(dtype=...) needs `rewritten` to be a module")
        memo: dict[int, Any] = {}  # shared parameters stay shared
        model, rewritten = copy.deepcopy((model, rewritten), memo)
        model, rewritten = model.to(dtype), rewritten.to(dtype)
        inputs = [_cast(x, dtype) for x in inputs]
        kwargs = {name: _cast(x, dtype) for name, x in (kwargs or {}).items()}
    expected = _run(model, model, inputs, kwargs or {}, grads)
    owner = rewritten if isinstance(rewritten, nn.Module) else model
    actual = _run(rewritten, owner, inputs, kwargs or {}, grads)
    if list(expected) != list(actual):
        odd = sorted(set(expected) ^ set(actual))
        raise AssertionError(f"not the same outputs, inputs or parameters: {', '.join(odd)}")
    failed = [f for name in expected if (f := _failure(name, expected, actual, rtol, atol))]
    if failed:
        worst = max(failed, key=lambda f: f.difference.relative)
        raise AssertionError(
            f"{len(failed)} of {len(expected)} tensors differ, worst: {worst.text}\n"
            + "\n".join(f"  {f.text}" for f in failed[:10])
        )


@dataclass(frozen=True)
class _Failure:
    text: str
    difference: Difference


def _failure(
    name: str,
    expected: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    rtol: float | None,
    atol: float | None,
) -> _Failure | None:
    a, b = actual[name], expected[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        text = f"{name}: {a.dtype} {list(a.shape)} instead of {b.dtype} {list(b.shape)}"
        return _Failure(text, Difference(float("inf"), float("inf"), float("inf")))
    default = TOLERANCES.get(b.dtype, (0.0, 0.0))
    found = difference(a, b)
    bound = (default[1] if atol is None else atol) + (
        default[0] if rtol is None else rtol
    ) * magnitude(b)
    if found.absolute <= bound:
        return None
    numbers = f"absolute {found.absolute:.2e}, relative {found.relative:.2e}, {found.ulp:.0f} ulp"
    return _Failure(f"{name}: {numbers}", found)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _run(
    function: Callable[..., Any],
    owner: nn.Module,
    inputs: Sequence[Any],
    kwargs: Mapping[str, Any],
    grads: bool,
) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    leaves = [_leaf(x, grads) for x in inputs]
    named = {name: _leaf(x, grads) for name, x in kwargs.items()}
    with torch.random.fork_rng(), torch.set_grad_enabled(grads):
        torch.manual_seed(0)
        outputs = dict(_tensors("output", function(*leaves, **named)))
    result = {name: value.detach() for name, value in outputs.items()}
    wanted = {
        **{f"gradient of input {i}": x for i, x in enumerate(leaves)},
        **{f"gradient of input {name}": x for name, x in named.items()},
        **{f"gradient of {_own_name(n)}": p for n, p in owner.named_parameters()},
    }
    wanted = {n: x for n, x in wanted.items() if isinstance(x, Tensor) and x.requires_grad}
    losses = [_weighted(x, i) for i, x in enumerate(outputs.values()) if x.requires_grad]
    if grads and wanted and losses:
        found = torch.autograd.grad(
            torch.stack(losses).sum(), list(wanted.values()), allow_unused=True
        )
        for (name, leaf), gradient in zip(wanted.items(), found, strict=True):
            result[name] = torch.zeros_like(leaf) if gradient is None else gradient
    return result


def _own_name(name: str) -> str:
    """torch.compile's wrapper puts a prefix before every name."""
    return name.removeprefix("_orig_mod.")


def _leaf(value: Any, grads: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(grads and value.is_floating_point())


def _weighted(output: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return (output.double() * weight.to(output.device)).sum()


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(f"{name}[{key!r}]", entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _tensors(f"{name}[{index}]", entry)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _tensors(f"{name}.{f.name}", getattr(value, f.name))


# --- golden graphs ----------------------------------------------------------------------------


class _WithText(Protocol):
    def text(self) -> str: ...


def assert_golden(graph: fx.GraphModule | fx.Graph | _WithText, path: str | Path) -> None:
    """Asserts that a graph, or a diff of graphs, is as the golden file says.

    ``pytest --fxport-accept`` writes the file instead.

    Args:
        graph: a graph, or anything whose ``text()`` is stable (`GraphDiff`).

    Raises:
        AssertionError: there is no file, or it says something else; the text is the difference.
    """
    from fxport.pytest_plugin import accepting

    path = Path(path)
    found = graph_text(graph) if isinstance(graph, fx.GraphModule | fx.Graph) else graph.text()
    found = found.rstrip("\n") + "\n"
    if accepting():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(found, encoding="utf-8")
        return
    if not path.exists():
        raise AssertionError(f"there is no golden file {path}: pytest --fxport-accept writes it")
    expected = path.read_text(encoding="utf-8")
    if found != expected:
        lines = difflib.unified_diff(
            expected.splitlines(), found.splitlines(), str(path), "now", lineterm="", n=2
        )
        raise AssertionError("\n".join(["pytest --fxport-accept takes the new one:", *lines]))
