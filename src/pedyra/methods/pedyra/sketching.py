"""When a gradient sketch is taken: one in the last `sketch_steps` steps before each adjustment."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pedyra.allocate.distributed import Average, one_process
from pedyra.allocate.schedule import LEAST_STEPS, Schedule, parts_of, resolve_schedule
from pedyra.config import RankConfig
from pedyra.lora.layer import AdaptedLayer
from pedyra.methods.pedyra.gradient_sketch import GradientSketch
from pedyra.methods.pedyra.noise import fewest_steps
from pedyra.methods.pedyra.settings import Settings
from pedyra.methods.pedyra.swaps import Gain

logger = logging.getLogger(__name__)

USUAL_STEPS = 27
"""Steps of an interval that is a fraction of the run where triples are tried: a third of it judges, and 9 steps are the
fewest that tell a gain from chance (`core.noise.fewest_steps`)."""

_PREFIX = "sketch."


class Sketching:
    """The sketches of a run, of which there is one at a time, or none.

    Args:
        layers: what is sketched.
        config: `seed`, and whether anything moves.
        settings: `sketch_size`, `sketch_steps` and `certainty`.
        schedule: when adjustments are.
        average: over the processes that see parts of a batch.
    """

    def __init__(
        self,
        layers: Sequence[AdaptedLayer],
        config: RankConfig,
        settings: Settings,
        schedule: Schedule,
        average: Average = one_process,
    ) -> None:
        self.layers, self.config, self.schedule, self.average = layers, config, schedule, average
        self.wanted, self.settings = config.moves != 0, settings
        self.current: GradientSketch | None = None
        self._chance: float | None = None
        """What `chance` was for the current sketch, once asked."""

    def prepare(self, step: int) -> None:
        """After step `step`: start a sketch if the next step is the first of its window."""
        if self.current is not None or not self.wanted:
            return
        adjustment = self.schedule.next_adjustment(step + 1)
        if adjustment is None:
            return
        # Fewer steps are left only where a run was taken up without its state.
        if LEAST_STEPS <= adjustment - step <= min(self.settings.sketch_steps, self.schedule.interval):
            self.current = self._new(adjustment, adjustment - step)

    @property
    def complete(self) -> bool:
        """Whether everything that an adjustment asks for has been measured."""
        return self.current.complete if self.current is not None else not self.wanted

    def observe(self, loss_scale: float) -> None:
        """Read the gradients of one step, of a loss that was multiplied by this."""
        if self.current is not None:
            self.current.observe(loss_scale)

    def skip(self) -> None:
        """Forget the gradients since the last step, which is not taken."""
        if self.current is not None:
            self.current.skip()

    def candidates(self) -> dict[str, list[Gain]]:
        """What the directions found would gain; once the sketch is complete."""
        assert self.current is not None
        return self.current.candidates(self.settings.certainty, self._least)

    def chance(self) -> float:
        """The bound of `core.noise.chance`, in standard errors; infinite where there is no sketch."""
        if self.current is None:
            return math.inf
        if self._chance is None:
            self._chance = self.current.chance(self.settings.certainty)
        return self._chance

    def turns(self) -> dict[str, Tensor]:
        """Layer -> W `(r, r)`, with which its triples are turned into those that are on trial; layers that have any."""
        if self.current is None or not self.current.turned:
            return {}
        each = zip(self.layers, self.current.on_trial, self.current.turned, strict=True)
        return {layer.name: W for layer, indices, W in each if len(indices)}

    def directions(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
        """The directions that new triples of the layer begin along."""
        assert self.current is not None
        return self.current.directions(layer, self.settings.certainty, self._least)

    def stop(self) -> None:
        """Take the probes out of the layers; what was measured stays until `forget`."""
        if self.current is not None:
            self.current.remove()

    def forget(self) -> None:
        """Be done with the sketch, if there is one."""
        self.stop()
        self.current = self._chance = None

    def tensors(self) -> dict[str, Tensor]:
        """The state in the middle of a sketch, for a checkpoint; empty between two."""
        return {} if self.current is None else {_PREFIX + k: v for k, v in self.current.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Go on after step `step` with what `tensors` gave then; other names are not looked at.

        A sketch that ends at no adjustment of this run, which then has other total steps, is left out.
        """
        self.forget()
        state = {name[len(_PREFIX) :]: value for name, value in tensors.items() if name.startswith(_PREFIX)}
        if not state:
            return
        done, steps = state["done"].tolist()
        if step + steps - done != self.schedule.next_adjustment(step + 1):
            logger.warning(
                "the gradient sketch of step %d was taken for an adjustment after step %d, which this run of %d steps "
                "does not have; it begins anew",
                step, step + steps - done, self.schedule.total_steps,
            )  # fmt: skip
            return
        self.current = self._new(step + steps - done, steps)
        self.current.load_tensors(state)

    @property
    def _least(self) -> float:
        """Errors beyond which a plan takes a gain at all."""
        return self.chance()

    def _new(self, adjustment: int, steps: int) -> GradientSketch:
        """The sketch of the `steps` steps that end at this adjustment, which also seeds its draws."""
        return GradientSketch(
            self.layers,
            q=self.settings.sketch_size,
            steps=steps,
            generator=torch.Generator().manual_seed(self.config.seed * 1_000_003 + adjustment),
            average=self.average,
        )


def schedule_of(config: RankConfig, total_steps: int) -> Schedule:
    """When `config` adjusts ranks in a run of `total_steps`. Raises ValueError as `resolve_schedule` does."""
    return resolve_schedule(
        total_steps,
        initial_warmup=config.initial_warmup,
        interval=config.interval,
        final_warmup=config.final_warmup,
        least_interval=LEAST_STEPS if config.moves != 0 else 1,
        usual_least=USUAL_STEPS if config.moves != 0 else 1,
    )


def too_short_to_try(settings: Settings, config: RankConfig, schedule: Schedule) -> str | None:
    """Why no triple is ever put on trial in this schedule, and what would change that; None where one can be."""
    if config.moves == 0:
        return None
    window, fewest = min(settings.sketch_steps, schedule.interval), fewest_steps(settings.certainty)
    judging = parts_of(window)[-1]
    if judging >= fewest:
        return None
    if fewest == math.inf:
        return f"no triple will be tried: nothing is as sure as certainty {settings.certainty}; take 4 at most"
    which = "method_settings.sketch_steps" if settings.sketch_steps < schedule.interval else "rank.interval"
    return (
        f"no triple will be tried: {which} is {window} steps, of which the last third, {judging}, judges gains, "
        f"and at certainty {settings.certainty} it takes {fewest} to tell one from chance; train longer, raise "
        f"{which} to {3 * int(fewest)}, or lower the certainty"
    )
