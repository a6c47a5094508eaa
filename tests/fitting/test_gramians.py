"""Sums over a window of steps: right whatever the loss is multiplied by, and however a step's samples come."""

from __future__ import annotations

import pytest
import torch
from closeness import close, same_bits
from torch import Tensor

from pedyra.fitting.gramians import Calibration, Gramians

R, STEPS, TOKENS = 3, 5, 8
A = {"a": torch.zeros(R, 7)}


def tokens(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, R, generator=generator), torch.randn(TOKENS, R, generator=generator)


def measured(scale: float = 1.0, pieces: int = 1, spoiled: int | None = None, blocks: int | None = None) -> Calibration:
    """Of steps of 4 samples; their losses' gradients times `scale`, in so many backward passes."""
    gramians = Gramians(A, blocks=blocks)
    observe = gramians.observer("a")
    for step in range(STEPS):
        h, g = tokens(step)
        if step == spoiled:
            g = g * float("inf")
        for part_h, part_g in zip(h.chunk(pieces), g.chunk(pieces), strict=True):
            observe(part_h, part_g * scale / 4)
        gramians.close(torch.tensor(4.0), scale)
    return gramians.calibration({"a": 10})


def same(found: Calibration, expected: Calibration) -> None:
    assert found.skipped == expected.skipped
    torch.testing.assert_close(found.samples, expected.samples)
    for name, layer in expected.layers.items():
        torch.testing.assert_close(found.layers[name].increases, layer.increases, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.layers[name].slopes.abs(), layer.slopes.abs(), rtol=1e-3, atol=1e-5)
        assert found.layers[name].tokens_per_sample == pytest.approx(layer.tokens_per_sample)


def test_a_scaled_loss_and_micro_batches_change_nothing():
    expected = measured()
    same(measured(scale=1024.0), expected)
    same(measured(pieces=4), expected)
    P = torch.stack([h.T @ h for h, _ in map(tokens, range(STEPS))]).sum(0)
    Q = torch.stack([g.T @ g for _, g in map(tokens, range(STEPS))]).sum(0)
    values = torch.linalg.eigvals((P @ Q).double()).real.sort(descending=True).values / (STEPS * TOKENS) ** 2
    torch.testing.assert_close(expected.layers["a"].increases, 2 * values / 2, rtol=1e-3, atol=0)  # 2 tokens a sample


def test_a_long_window_keeps_blocks_of_steps_whose_slopes_are_those_of_all_their_samples():
    every, found = measured(), measured(blocks=2)
    assert found.samples.tolist() == [8.0, 8.0, 4.0]
    slopes = every.layers["a"].slopes
    blocks = torch.stack([slopes[:2].mean(0), slopes[2:4].mean(0), slopes[4]])
    torch.testing.assert_close(found.layers["a"].slopes.abs(), blocks.abs(), rtol=1e-3, atol=1e-5)
    assert same_bits(found.layers["a"].increases, every.layers["a"].increases)


@pytest.mark.parametrize("r", [8, 64, 128])
def test_memory_of_a_long_window_grows_little_with_the_rank(r):
    gramians = Gramians({"a": torch.zeros(r, 7), "b": torch.zeros(1, 7)})
    for _ in range(600):
        gramians.close(torch.tensor(1.0))
    numbers = gramians.tensors()["K.a"].numel()
    assert numbers <= (256 * 32**2 if r <= 64 else 2 * 16 * r**2)
    assert gramians.blocks >= 16


def test_processes_count_by_their_samples_however_each_divides_its_loss():
    """One sees a sample and divides by it, one three and multiplies by as much; the third has none."""
    h, g = tokens(0)
    flat: list[Tensor] = []

    def together(own: Tensor) -> Tensor:
        flat.append(own)
        return torch.stack(flat).sum(0)

    for part, samples, scale in ((slice(0, 2), 1.0, 1.0), (slice(2, 8), 3.0, 5.0), (slice(0, 0), 0.0, 0.0)):
        gramians = Gramians(A, together)
        gramians.observer("a")(h[part], g[part] * scale / max(samples, 1.0))
        gramians.close(torch.tensor(samples), scale)
    state = gramians.tensors()
    assert close(state["K.a"][-1], h.T @ g / 4)
    assert close(state["Q.a"], g.T @ g)
    assert state["samples"].tolist() == [4.0]


def test_padding_counts_for_nothing():
    gramians = Gramians(A)
    for step in range(STEPS):
        h, g = tokens(step)
        gramians.observer("a")(torch.cat([h, torch.ones(3, R)]), torch.cat([g, torch.zeros(3, R)]) / 4)
        gramians.close(torch.tensor(4.0))
    same(gramians.calibration({"a": 10}), measured())


def test_a_step_that_is_not_finite_is_left_out_and_counted():
    found = measured(spoiled=4)
    assert (found.skipped, len(found.samples)) == (1, STEPS - 1)
    assert found.layers["a"].slopes.isfinite().all()


def test_state_goes_through_a_checkpoint_in_the_middle_of_a_window_and_after_it():
    gramians = Gramians(A)
    for step in range(STEPS):
        h, g = tokens(step)
        if step == 3:
            saved = gramians.tensors()
            gramians = Gramians(A)
            gramians.load(saved)
        gramians.observer("a")(h, g / 4)
        gramians.close(torch.tensor(4.0))
    found = gramians.calibration({"a": 10})
    same(found, measured())
    with pytest.raises(ValueError, match="not in the checkpoint, or of another rank"):
        Gramians({"a": torch.zeros(R + 1, 7)}).load(saved)


def test_a_window_goes_on_where_its_layers_are_whatever_device_brought_samples_and_state():
    """A checkpoint is read on the CPU. The meta device stands for a GPU: it does not mix with the CPU either."""
    gramians = Gramians({"a": torch.zeros(R, 7, device="meta")})
    gramians.load({**Gramians(A).tensors(), "samples": torch.ones(2), "K.a": torch.zeros(2, R, R)})
    gramians.close(torch.ones((), device="meta"))
    gramians.close(torch.ones(()))
    assert gramians.tensors()["samples"].device.type == "meta"
