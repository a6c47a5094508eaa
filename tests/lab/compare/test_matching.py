"""Equal parameters are solved for, and what cannot be equal is refused with the closest two."""

from __future__ import annotations

from typing import Any

import pytest

from pedyra.app.recipe import Recipe
from pedyra.app.recipe_sections import LoraSection, MethodSection, ModelSection
from pedyra.lab.compare.prepare import BareModel, match_parameters

TARGETS = ["query", "value"]


def recipe(method: str, r: int = 8, **settings: Any) -> Recipe:
    content = {"name": "x", "method": method, "model": {"name": "tiny-bert"}, "data": {"source": "toy"}}
    lora = {"r": r, "alpha": 2 * r, "target_modules": TARGETS, **settings}
    return Recipe.model_validate({**content, "lora": lora})


@pytest.fixture(scope="module")
def count() -> BareModel:
    return BareModel(recipe("lora"))


@pytest.fixture(scope="module")
def shape(count) -> tuple[int, int]:
    """Number of targets and width of tiny-bert, from its own config."""
    config = count.base.config
    return 2 * config.num_hidden_layers, config.hidden_size


def test_lora_and_dora_are_counted_without_the_head(count, shape):
    layers, width = shape
    assert count.lora_parameters(recipe("lora"), 8) == layers * 8 * 2 * width
    assert count.lora_parameters(recipe("dora"), 8) == layers * (8 * 2 * width + width)
    assert count.lora_parameters(recipe("pedyra", use_dora=True), 8) == count.lora_parameters(recipe("dora"), 8)


def test_dora_is_matched_where_its_magnitudes_are_few(count):
    # 31 widths at 15 and 33 at 16 are equally near to 32: the smaller.
    assert match_parameters("dora", recipe("dora"), 16, recipe("lora"), count) == 15
    assert match_parameters("pissa", recipe("pissa"), 16, recipe("lora"), count) == 16


def test_dora_at_a_small_budget_is_refused_with_the_closest_two(count, shape):
    layers, width = shape
    low, high = layers * 3 * width, layers * 5 * width
    message = (
        f"method dora cannot match the baseline's {layers * 4 * width:,} parameters within 5%: the closest are "
        f"{low:,} at lora.r 1 and {high:,} at lora.r 2"
    )
    with pytest.raises(ValueError, match=message):
        match_parameters("dora", recipe("dora"), 2, recipe("lora"), count)


def test_randlora_has_the_bases_with_the_nearest_count(count, shape):
    layers, width = shape
    # ceil(width / r) bases of r + width scalings each, per layer.
    counts = [layers * -(-width // r) * (r + width) for r in range(1, width + 1)]
    nearest = min(counts, key=lambda each: abs(each - layers * 4 * 2 * width))
    assert abs(nearest / (layers * 4 * 2 * width) - 1) <= 0.05
    assert count.method_parameters(recipe("randlora"), 4) == nearest
    assert match_parameters("randlora", recipe("randlora"), 4, recipe("lora"), count) == 4


def test_randlora_with_bases_of_its_own_has_to_be_as_large_too(count):
    own = recipe("randlora").model_copy(update={"method": MethodSection(name="randlora", r=1)})  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="cannot match .*; remove methods.randlora.method.r, or"):
        match_parameters("randlora", own, 4, recipe("lora"), count)


def test_a_start_that_randlora_has_not_is_told_before_it_is_matched(count):
    with pytest.raises(ValueError, match="lora.init is 'pissa', but PEFT's RandLoRA does not have it"):
        match_parameters("randlora", recipe("randlora", init="pissa"), 4, recipe("lora"), count)


@pytest.mark.parametrize("model", ["tiny-deberta", "tiny-bart"])  # whose heads are more than one layer
def test_randlora_is_counted_beside_a_head_of_several_layers(model):
    def of(method: str) -> Recipe:
        return recipe(method, 4).model_copy(update={"model": ModelSection(name=model), "lora": LoraSection(r=4)})

    base = BareModel(of("lora"))
    r = match_parameters("randlora", of("randlora"), 4, of("lora"), base)
    assert base.method_parameters(of("randlora"), r) == pytest.approx(base.lora_parameters(of("lora"), 4), rel=0.05)


def test_counting_leaves_the_model_as_it_was(count):
    names = [name for name, _ in count.base.named_parameters()]
    count.lora_parameters(recipe("dora"), 3)
    count.method_parameters(recipe("randlora"), 7)
    assert [name for name, _ in count.base.named_parameters()] == names
