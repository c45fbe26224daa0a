"""Random compositions of scale, mask, layout, grouping and extras, against eager in float64.

Legal compositions must be found and be right; nothing else may be different either. Most cases
are traced directly; every one of a smaller number goes through Dynamo. ``FXPORT_FUZZ`` sets the
number of direct cases; with ``FXPORT_FUZZ_SEED`` they are others than those of CI.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from attention_graphs import Site, compare, rewrite, trace_directly, trace_training
from hypothesis import HealthCheck, Phase, given, settings
from random_attention import Recipe, recipes
from torch import Tensor, fx

from fxport.passes.attention.masks import MaskPlan

CASES = int(os.environ.get("FXPORT_FUZZ", "500"))
SEED = os.environ.get("FXPORT_FUZZ_SEED")
DYNAMO_CASES = 25

Trace = Callable[..., fx.GraphModule]

# Why a composition may be refused: it has rows without keys, by its constant mask or by the data.
REFUSALS = {"fully-masked-row", "order-of-operations", "unsupported-feature", "mask-not-proven"}


def data_of(recipe: Recipe, batch: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch * 31 + length)
    both = recipe.size + recipe.value_size
    keys = length + recipe.more

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    pad = torch.randint(0, 3, (batch, keys), generator=generator)
    x = random(batch, length, recipe.heads * recipe.size) * recipe.loud
    return [x, random(batch, keys, recipe.kv_heads * both), pad]


def may_be_refused(recipe: Recipe, lengths: list[int]) -> bool:
    if recipe.padding or recipe.length == 1:
        return True
    if stays_combined(recipe):
        return True
    flags = recipe.pattern in ("none", "causal") and not recipe.from_end
    if recipe.scale == "cosines" and not (
        flags and recipe.use != "renormalised" and recipe.extra == recipe.second == "none"
    ):
        return True  # a mask that is no flag might hide a key that is divided by 0
    dense = recipe.second == "relative"  # gathered it is no product of queries and keys
    if dense and recipe.extra in ("softcap", "temperature"):
        return True
    if recipe.fill != float("-inf") and (dense or recipe.use == "renormalised"):
        return True  # what the data add may be as low as the fill
    if recipe.use == "renormalised" and dense:
        return True  # what is gathered from a product is not told from a mask of the data there
    if recipe.pattern == "none":
        return False
    if not recipe.dynamic:
        return not recipe.allowed(recipe.length, recipe.length + recipe.more).any(-1).all()
    # Queries and keys have lengths of their own: there may be more queries than keys.
    longest = max([*lengths, 40])
    return not recipe.allowed(longest + 10, longest).any(-1).all()


def stays_combined(recipe: Recipe) -> bool:
    """Whether products are written in a way in which their weights are not told apart."""
    if recipe.use == "pairs":
        return recipe.layout not in ("matmul", "reversed")
    return recipe.use in ("difference", "two values") and recipe.layout == "elementwise"


def check(recipe: Recipe, trace: Trace) -> None:
    function: Callable[..., Tensor] = lambda *x: recipe(*x)  # noqa: E731
    module = Site(function, [torch.linspace(0.5, 1.5, recipe.heads, dtype=torch.float64)])
    data = data_of(recipe, recipe.batch, recipe.length)
    symbolic = recipe.dynamic and recipe.batch > 1 and recipe.length > 1
    dynamic = {0: (0, 1), 1: (0, 1), 2: (0, 1)} if symbolic else {}
    found = rewrite(trace(module, data, dynamic), check_scores=True)
    others = [(recipe.batch + 1, recipe.length + 3), (2, 13), (2, 29)] if symbolic else []
    if found.count == 0:
        assert may_be_refused(recipe, [n for _, n in others]), found.result.decisions
        if recipe.length > 1:
            apart = {"attention-weights-used-elsewhere"} if stays_combined(recipe) else set()
            assert set(found.left()) <= REFUSALS | apart, found.result.decisions
    # A row without keys is NaN in both; where a mask is added, eager lets that NaN through to some
    # gradients of q and k, we to all of that row.
    for given_data in (data, *(data_of(recipe, *sizes) for sizes in others)):
        try:
            compare(module, found.graph, given_data, 1e-6, nan_spreads=True)
        except RuntimeError as error:
            assert recipe.loud > 1 and "reach the number that they are masked with" in str(error)


def fuzz(count: int) -> Callable[..., Callable[..., None]]:
    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        test = settings(
            max_examples=count,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=SEED is None,
            database=None,
            phases=[Phase.explicit, Phase.generate],  # the case is small as it is
        )(given(recipe=recipes)(test))
        return test if SEED is None else hypothesis.seed(int(SEED))(test)

    return decorate


@fuzz(CASES)
def test_random_attention(recipe: Recipe) -> None:
    check(recipe, trace_directly)


def test_nan_rows_of_a_window_spoil_all_values() -> None:
    """Those outside of the window too, though no kernel looks at them. Found by this fuzzer."""
    recipe = Recipe(
        batch=2, length=5, more=1, kv_heads=3, groups=3, size=6, value_size=4, repeat="index",
        layout="einsum", scale="k", pattern="window", width=1, from_end=True, spelling="fill",
        fill=float("-inf"), extra="learned alibi", padding="fill", pad_first=True, softmax="call",
        loud=1.0, dynamic=False,
    )  # fmt: skip
    check(recipe, trace_directly)


def test_nan_rows_reach_keys_that_are_beyond_every_query() -> None:
    """The last key is: its gradient was 0, where a mask that is added makes it NaN."""
    recipe = Recipe(
        batch=4, length=4, more=1, kv_heads=4, groups=1, size=4, value_size=4, repeat="stack",
        layout="reversed", scale="after", pattern="late window", width=4, from_end=False,
        spelling="add", fill=float("-inf"), extra="learned alibi", padding="fill", pad_first=False,
        softmax="call", loud=1.0, dynamic=False, use="pairs",
    )  # fmt: skip
    check(recipe, trace_directly)


def test_the_only_head_repeated_by_cat_beside_sinks() -> None:
    """Was left: cat([k[:, :1], k[:, :1], ..], 1) of one head counted as another batch each."""
    recipe = Recipe(
        batch=1, length=5, more=1, kv_heads=1, groups=3, size=2, value_size=4, repeat="cat",
        layout="reversed", scale="k", pattern="full", width=4, from_end=True, spelling="inplace",
        fill=-1e9, extra="sinks", padding="", pad_first=False, softmax="call", loud=1.0,
        dynamic=False,
    )  # fmt: skip
    check(recipe, trace_directly)


def test_axes_along_which_sinks_vary_are_heads() -> None:
    """Was left: there are as many groups as keys, so they counted as queries."""
    recipe = Recipe(
        batch=4, length=2, more=1, kv_heads=3, groups=3, size=4, value_size=4, repeat="expand",
        layout="reversed", scale="after", pattern="causal", width=4, from_end=False,
        spelling="fill", fill=float("-inf"), extra="sinks", padding="", pad_first=False,
        softmax="call", loud=1.0, dynamic=False,
    )  # fmt: skip
    check(recipe, trace_directly)


def test_a_second_product_of_pairs_may_be_as_low_as_the_fill() -> None:
    recipe = Recipe(
        batch=2, length=7, more=0, kv_heads=2, groups=3, size=9, value_size=9, repeat="interleave",
        layout="reversed", scale="divided", pattern="causal", width=2, from_end=True,
        spelling="fill", fill=-1e4, extra="none", padding="", pad_first=True, softmax="written",
        loud=1.0, dynamic=False, second="shared", use="pairs",
    )  # fmt: skip
    check(recipe, trace_directly)


def test_a_temperature_on_a_second_product_beside_joined_values() -> None:
    recipe = Recipe(
        batch=1, length=2, more=0, kv_heads=2, groups=2, size=8, value_size=4, repeat="stack",
        layout="einsum", scale="q", pattern="root", width=1, from_end=True, spelling="add",
        fill=-1e4, extra="temperature", padding="", pad_first=False, softmax="late", loud=1.0,
        dynamic=False, second="shared", use="two values",
    )  # fmt: skip
    check(recipe, trace_directly)


def test_weights_in_pairs_of_heads_whose_keys_come_in_threes() -> None:
    """Was left: no axes serve both groupings, so keys count as a value of every head."""
    recipe = Recipe(
        batch=2, length=8, more=1, kv_heads=4, groups=3, size=7, value_size=3, repeat="stack",
        layout="reversed", scale="q", pattern="dilated", width=2, from_end=False, spelling="add",
        fill=-1e4, extra="softcap", padding="", pad_first=False, softmax="written", loud=1.0,
        dynamic=False, use="pairs",
    )  # fmt: skip
    check(recipe, trace_directly)


def test_a_gate_that_is_computed_from_repeated_keys() -> None:
    recipe = Recipe(
        batch=2, length=4, more=0, kv_heads=3, groups=3, size=6, value_size=6, repeat="stack",
        layout="folded", scale="k", pattern="late", width=2, from_end=False, spelling="inplace",
        fill=-1e9, extra="softcap", padding="", pad_first=False, softmax="written", loud=1.0,
        dynamic=False, use="gated",
    )  # fmt: skip
    check(recipe, trace_directly)


def test_an_added_mask_hides_no_key_that_is_divided_by_zero() -> None:
    """Was left: only a fill hides the NaN of such a key, and in float64 -1e5 stays a bias."""
    recipe = Recipe(
        batch=3, length=4, more=0, kv_heads=1, groups=3, size=3, value_size=4, repeat="stack",
        layout="matmul", scale="cosines", pattern="causal", width=1, from_end=False,
        spelling="add", fill=-1e5, extra="none", padding="", pad_first=False, softmax="call",
        loud=1.0, dynamic=False,
    )  # fmt: skip
    check(recipe, trace_directly)


def test_what_is_put_back_comes_after_its_sizes() -> None:
    """Two products with the weights were joined; the second was put back before its sizes."""
    recipe = Recipe(
        batch=2, length=8, more=1, kv_heads=4, groups=3, size=4, value_size=8, repeat="tile",
        layout="folded", scale="q", pattern="full", width=1, from_end=True, spelling="where",
        fill=-1e9, extra="bias", padding="add", pad_first=True, softmax="late", loud=3000.0,
        dynamic=True, use="two values",
    )  # fmt: skip
    check(recipe, trace_directly)


@fuzz(DYNAMO_CASES)
def test_random_attention_through_dynamo(recipe: Recipe) -> None:
    check(recipe, trace_training)


def test_the_fuzzer_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every window one key too wide, some case of the first hundred must fail."""
    from fxport.passes.attention import rewrite as attention

    real = attention.plan_masks

    def wider(*given: Any, **options: Any) -> MaskPlan:
        plan = real(*given, **options)
        lower = plan.band.lower
        if lower is None:
            return plan
        return dataclasses.replace(plan, band=dataclasses.replace(plan.band, lower=lower - 1))

    monkeypatch.setattr(attention, "plan_masks", wider)
    with pytest.raises((AssertionError, hypothesis.errors.HypothesisException, ExceptionGroup)):
        fuzz(100)(lambda recipe: check(recipe, trace_directly))()
