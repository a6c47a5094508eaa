"""The smaller adapter goes to the Hub with a card that says how small it is, and what proves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import pedyra
from pedyra.fitting.result import fit_card
from pedyra.lora.card import CARD, shown_megabytes


@pytest.fixture
def found(make_trainer: Any) -> pedyra.Fit:
    return pedyra.fit(make_trainer(), tolerance="5%", rows=64)


def test_the_card_says_how_much_is_left_and_what_proves_it(found: pedyra.Fit, tmp_path: Path):
    card = ModelCard.load(found.save(tmp_path / "small") / CARD)
    data = card.data.to_dict()
    assert data["tags"] == ["pedyra", "lora"] and data["library_name"] == "peft" and data["metrics"] == ["accuracy"]
    row = found.row()
    assert not found.is_whole
    for told in (
        f"{row['parameters']:,}",
        f"{row['share']:.1%}",
        f"{row['measured_increase']:+.4f}",
        f"{row['tolerance']:.4f}",
        f"-> {row['metrics']['smaller']['accuracy']:.4f}",
    ):
        assert told in card.text


@pytest.mark.parametrize(("count", "told"), [(0.0104, "10.4 kB"), (0.5, "0.50 MB"), (1234.5, "1,234.50 MB")])
def test_a_size_keeps_three_digits_however_small(count: float, told: str):
    assert shown_megabytes(count) == told


def test_nothing_is_called_smaller_where_everything_is_kept(make_trainer: Any):
    found = pedyra.fit(make_trainer(trains=False), rows=64)
    assert found.is_whole and {*found.metrics} == {"base", "whole"}
    assert "smaller" not in str(found) + fit_card(found, "base").lower()


@pytest.mark.parametrize(
    ("name", "in_metadata", "shown"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/home/somebody/models/own", None, "own"),
    ],
)
def test_the_card_names_a_base_of_the_hub_and_no_path_of_this_machine(
    found: pedyra.Fit, name: str, in_metadata: str | None, shown: str
):
    card = ModelCard(fit_card(found, name))
    assert card.data.to_dict().get("base_model") == in_metadata
    assert f"| base model | {shown} |" in card.text and "somebody" not in str(card)
