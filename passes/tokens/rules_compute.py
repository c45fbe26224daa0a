"""Rules of ops that compute: reductions, products, look-ups, and attention itself."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import fxport.ops.attention
import fxport.ops.experts  # noqa: F401
from fxport.capture.arguments import shape_of
from fxport.errors import ReasonCode
from fxport.passes.axes import Axes, Axis, Dim, Refusal, checked, has_axis, join, name
from fxport.passes.tokens.call import RULES, Call, free, rule

__all__: list[str] = []

aten = torch.ops.aten


# --- reductions and other ops along a dimension ------------------------------------------------


@rule(
    aten.mean,
    aten.sum,
    aten.amax,
    aten.amin,
    aten.var,
    aten.std,
    aten.prod,
    aten.argmax,
    aten.argmin,
    aten.any,
    aten.all,
    aten.logsumexp,
    aten.linalg_vector_norm,
    aten.norm,
    aten.max,
    aten.min,
    aten.var_mean,
    aten.std_mean,
    aten.median,
    aten.aminmax,
    aten.nansum,
    aten.count_nonzero,
    aten.linalg_norm,
    aten.kthvalue,
)
def _reduce(call: Call) -> Any:
    if "other" in call.arguments:  # max(a, b) of two tensors
        return join(*call.all())
    axes = call.of("self")
    given = call.arguments.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(len(axes)))
    reduced = {d % max(len(axes), 1) for d in dims}
    operation = str(call.node.target).split(".")[1]
    for d in reduced:
        free(axes[d], operation)
    keep = call.arguments.get("keepdim", False)
    left = tuple(() if i in reduced else d for i, d in enumerate(axes) if keep or i not in reduced)
    value = call.node.meta["val"]
    return left if isinstance(value, torch.Tensor) else (left,) * len(value)


@rule(
    aten.softmax,
    aten._softmax,
    aten.log_softmax,
    aten._log_softmax,
    aten.cumsum,
    aten.cumprod,
    aten.sort,
    aten.argsort,
    aten.topk,
    aten.logcumsumexp,
    aten.cummax,
    aten.cummin,
    aten.glu,
)
def _along_dim(call: Call) -> Any:
    axes = call.of("self")
    index = call.dim("dim", len(axes))
    free(axes[index], str(call.node.target).split(".")[1])
    value = call.node.meta["val"]
    values = [value] if isinstance(value, torch.Tensor) else list(value)
    out = tuple(
        axes
        if v.dim() == 0
        else (*axes[:index], call.symbols.factor(int(v.shape[index])), *axes[index + 1 :])
        for v in values
    )
    return out[0] if isinstance(value, torch.Tensor) else out


@rule(aten.layer_norm, aten.rms_norm)
def _norm(call: Call) -> Axes:
    axes = call.of("input")
    count = len(call.arguments["normalized_shape"])
    for dim in axes[len(axes) - count :]:
        free(dim, "normalisation")
    return axes


@rule(aten.group_norm)
def _group_norm(call: Call) -> Axes:
    """Over everything but the first axis, ``[N, C, ...]``."""
    axes = call.of("input")
    for dim in axes[1:]:
        free(dim, "group norm")
    return axes


@rule(aten.prelu)
def _prelu(call: Call) -> Axes:
    """One slope, or one for each entry of the second axis."""
    axes = call.of("self")
    if call.of("weight") not in ((), ((),)):
        free(axes[1], "a slope for each channel")
    return axes


@rule(aten.cosine_similarity)
def _cosine_similarity(call: Call) -> Axes:
    axes = join(call.of("x1"), call.of("x2"))
    index = call.dim("dim", len(axes))
    free(axes[index], "cosine similarity")
    return (*axes[:index], *axes[index + 1 :])


@rule(aten.conv1d, aten.conv2d, aten.conv3d)
def _convolution(call: Call) -> Axes:
    """A kernel of one entry that stands on every entry in turn is a projection of each."""
    axes, kernel = call.of("input"), shape_of(call.arguments["weight"])
    first = len(axes) - len(kernel) + 2  # dimension that the kernel moves along
    free(axes[first - 1], "a convolution")
    for given in ("weight", "bias"):
        for dim in call.of(given) if call.arguments[given] is not None else ():
            free(dim, f"a convolution's {given}")
    steps, padding, sizes = call.arguments["stride"], call.arguments["padding"], call.sizes()
    in_turn = set(steps) == {1} and (isinstance(padding, str) or set(padding) == {0})
    result = [*axes[: first - 1], call.symbols.factor(sizes[first - 1])]
    for d in range(first, len(axes)):
        alone = in_turn and kernel[d - len(axes)] == 1
        if not alone:
            free(axes[d], "a convolution")
        result.append(axes[d] if alone else call.symbols.factor(sizes[d]))
    return tuple(result)


@rule(aten.batch_norm)
def _batch_norm(call: Call) -> Axes:
    if call.arguments["training"]:
        raise Refusal(ReasonCode.MIXES_TOKENS, "batch norm over the tokens of the batch")
    return call.of("input")


@rule(aten.pad, aten.constant_pad_nd)
def _pad(call: Call) -> Axes:
    axes = call.of("self")
    sizes, before = call.sizes(), shape_of(call.arguments["self"])
    padding = call.arguments["pad"]
    padded = {len(axes) - 1 - i // 2 for i, width in enumerate(padding) if width != 0}
    for d in padded:
        free(axes[d], "padding")
    return tuple(
        call.symbols.factor(sizes[d]) if d in padded else axes[d] for d in range(len(before))
    )


# --- products --------------------------------------------------------------------------------


@rule(aten.linear)
def _linear(call: Call) -> Axes:
    axes, weight = call.of("input"), call.of("weight")
    free(axes[-1], "a linear layer")
    for dim in weight:
        free(dim, "a linear layer's weight")
    return (*axes[:-1], weight[0])


@rule(aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
def _cell(call: Call) -> Axes:
    """One step of a recurrent cell, for each row by itself: ``[N, C]`` and ``[N, H]``."""
    rows, state = call.of("input"), call.of("hx")
    given = [call.arguments[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    weights = [dim for weight in given if weight is not None for dim in call.axes[weight]]
    for dim in (rows[-1], state[-1], *weights):
        free(dim, "a recurrent cell")
    return (*join(rows[:-1], state[:-1]), state[-1])


@rule(aten.matmul, aten.mm, aten.bmm, aten.mv, aten.dot, aten.vdot)
def _matmul(call: Call) -> Axes:
    names = ("self", "other", "mat2", "vec", "tensor")
    left, right = (call.axes[n] for n in _operands(call, names))
    return _product(left, right)


@rule(aten.addmm, aten.baddbmm)
def _add_product(call: Call) -> Axes:
    first, second = (call.axes[n] for n in _operands(call, ("mat1", "mat2", "batch1", "batch2")))
    return join(call.of("self"), _product(first, second))


def _operands(call: Call, names: Sequence[str]) -> list[fx.Node]:
    return [call.arguments[n] for n in names if n in call.arguments]


def _product(left: Axes, right: Axes) -> Axes:
    """As `torch.matmul`: a vector is a matrix of one row, or of one column, that goes again."""
    if len(left) < 2:
        found = _product(((), *left), right)
        return (*found[: len(found) - 2], found[-1])
    if len(right) < 2:
        return _product(left, (*right, ()))[:-1]
    free(left[-1], "a matrix product")
    free(right[-2], "a matrix product")
    outer = join(left[:-2], right[:-2]) if left[:-2] or right[:-2] else ()
    return checked((*outer, left[-2], right[-1]))


@rule(aten.tensordot)
def _tensordot(call: Call) -> Axes:
    left, right = call.of("self"), call.of("other")
    summed = [
        {d % len(axes) for d in call.arguments[name]}
        for axes, name in ((left, "dims_self"), (right, "dims_other"))
    ]
    for axes, dims in zip((left, right), summed, strict=True):
        for d in dims:
            free(axes[d], "a tensor product")
    return checked(
        tuple(
            dim
            for axes, dims in zip((left, right), summed, strict=True)
            for d, dim in enumerate(axes)
            if d not in dims
        )
    )


@rule(aten.outer, aten.ger)
def _outer(call: Call) -> Axes:
    first, second = (call.axes[n] for n in _operands(call, ("self", "vec2")))
    return checked((first[0], second[0]))


@rule(aten.einsum)
def _einsum(call: Call) -> Axes:
    operands = [call.axes[t] for t in call.arguments["tensors"]]
    equation = _spelled_out(call.arguments["equation"], operands)
    inputs, output = equation.split("->")
    letters: dict[str, Dim] = {}
    for subscript, axes in zip(inputs.split(","), operands, strict=True):
        for letter, dim in zip(subscript, axes, strict=True):
            letters[letter] = join((letters.get(letter, ()),), (dim,))[0]
    for letter in set(letters) - set(output):
        free(letters[letter], f"the einsum `{equation}`")
    return checked(tuple(letters[letter] for letter in output))


def _spelled_out(equation: str, operands: Sequence[Axes]) -> str:
    """Without an ellipsis, and with its output.

    "...d,de->...e" for [b, t, d]  ->  "XYd,de->XYe"
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    subscripts = inputs.split(",")
    if not arrow:  # letters that occur once, in alphabetic order, behind the ellipsis
        once = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    unused = [c for c in string.ascii_letters if c not in equation]
    dots = [
        len(axes) - len(subscript.replace("...", ""))
        for subscript, axes in zip(subscripts, operands, strict=True)
        if "..." in subscript
    ]
    longest = max(dots, default=0)
    letters = "".join(unused[:longest])
    widths = iter(dots)
    subscripts = [
        s.replace("...", letters[longest - next(widths) :] if "..." in s else "")
        for s in subscripts
    ]
    return f"{','.join(subscripts)}->{output.replace('...', letters)}"


# --- attention --------------------------------------------------------------------------------


def _attention(call: Call) -> tuple[Axes, Axes]:
    """``fxport::attention``: the one op that may look at other tokens, if it is causal."""
    wanted: Dim = (Axis.TOKEN,)
    for operand in ("q", "k", "v"):
        axes = call.of(operand)
        if axes[2] != wanted or axes[0] not in ((Axis.BATCH,), ()) or has_axis(axes[1]):
            words = ", ".join(name(d) for d in axes)
            raise Refusal(
                ReasonCode.MIXES_TOKENS,
                f"attention's {operand} is made of {words}, not of batch, heads, token, head size",
            )
        free(axes[3], "attention")
    if not call.arguments["causal"]:
        raise Refusal(
            ReasonCode.NOT_CAUSAL,
            "this attention sees later tokens, so the model cannot generate token by token",
            "use a causal mask",
        )
    for operand, what in (("bias", "an additive bias"), ("cu_seqlens", "packed sequences")):
        if call.arguments[operand] is not None:
            raise Refusal(
                ReasonCode.UNSUPPORTED_FEATURE,
                f"attention with {what} cannot be expressed by vLLM's attention layer",
            )
    if call.arguments["q_offset"] != 0 or call.arguments["dropout_p"] != 0:
        raise Refusal(ReasonCode.UNSUPPORTED_FEATURE, "queries do not start at the first key")
    if call.arguments["chunk"] and call.arguments["softcap"]:
        raise Refusal(
            ReasonCode.UNSUPPORTED_FEATURE,
            "attention in chunks of positions, with a softcap: vLLM's layers would cap the number"
            " that keeps the chunk before away",
        )
    q, v = call.of("q"), call.of("v")
    return (*q[:3], v[3]), q[:3]


def _expert_linear(call: Call) -> Axes:
    """Every row with the weight of its own expert."""
    x, experts = call.of("x"), call.of("experts")
    if any(map(has_axis, call.of("weight"))):
        raise Refusal(ReasonCode.MIXES_TOKENS, "the experts' weights hold tokens")
    free(x[-1], "a product with an expert's weight")
    return (*join(x[:-1], experts), call.of("weight")[1])


RULES[torch.ops.fxport.attention.default] = _attention
RULES[torch.ops.fxport.expert_linear.default] = _expert_linear
