"""`pedyra bench step`: what a training step costs, against PEFT's methods and against no adapter at all.

All methods train in one process, one step each in random order, so that whatever else the machine does hits all alike;
a ratio is the median over rounds of a method's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from statistics import median, quantiles
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.allocate.schedule import Schedule, resolve_schedule
from pedyra.lab.bench.direct import MaskedReference
from pedyra.lab.bench.measuring import check_device, now, storages
from pedyra.lab.bench.models import BenchModel, bench_model
from pedyra.lab.bench.run import configured
from pedyra.lab.bench.spec import MethodSpec, parse_method
from pedyra.methods.data import Data, model_loss
from pedyra.methods.loop import make_optimizer
from pedyra.methods.method import SCHEDULE, Adaptation, Hooks, Request, Running
from pedyra.methods.registry import get_method
from pedyra.pe_dyra.config import RankSettings

FLOOR, DIRECT = "floor", "direct"
"""No adapter at work, and PE-DyRA as a direct implementation does it: what is timed beside the methods."""
DEFAULT = (
    *(FLOOR, "lora", "adalora", "dora", DIRECT),
    *(f"pedyra:{alpha}fused={fused}" for alpha in ("", "alpha=1.0,") for fused in ("false", "true")),
)
COLUMNS = {
    "model": "model", "variant": "method", "ratio_to_lora": "by lora", "spread": "quartiles",
    "ratio_to_floor": "by floor", "peak_bytes": "peak bytes", "trainable_parameters": "trained",
    "adjustment_seconds": "adjustment, s",
}  # fmt: skip
"""Columns of a row for people, with their titles."""
KINDS = ("observed", "idle")
"""Of the steps of a method that observes some of them."""
LEAST_ROUNDS = 8
"""Of each kind of step: an adjustment follows every fourth part of the observed ones."""
LR = 1e-4
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How steps are timed, the same for every model and method.

    Raises:
        ValueError: too few rounds, an unknown dtype or device, or one that is not here.
    """

    rounds: int = 20
    """Half of the timed steps: those that a method observes, and as many that it does not."""
    rank: int = 8
    batch: int | None = None
    """Rows of a step; None: the model's."""
    length: int | None = None
    """Tokens of a row; None: the model's."""
    dtype: str = "float32"
    device: str = "cpu"
    run_steps: int = 1000
    """Length of the run whose mean step is told."""
    cpu_time: bool = False
    """Count processor time, for a machine that others use, with one thread."""

    def __post_init__(self) -> None:
        if self.rounds < LEAST_ROUNDS:
            raise ValueError(f"rounds is {self.rounds}; what is measured takes at least {LEAST_ROUNDS}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype {self.dtype!r} is unknown; choose float32 or bfloat16")
        check_device(self.device)

    @property
    def total_steps(self) -> int:
        """Measured steps, warm-up included; the schedule of every method spans them."""
        return _WARMUP + 2 * self.rounds

    @property
    def schedule(self) -> dict[str, int]:
        """`rounds` steps that are observed, with adjustments among them, and `rounds` that are not."""
        return {"initial_warmup": _WARMUP, "interval": self.rounds // 4, "final_warmup": self.rounds - 1}

    def now(self) -> float:
        return now(self.device, cpu_time=self.cpu_time)


def bench_step(
    models: Sequence[str], methods: Sequence[str] = DEFAULT, setting: Setting | None = None
) -> Iterator[Any]:
    """One row per model and method, as each model is done.

    PE-DyRA and its like observe the first `rounds` steps, with four adjustments, and have nothing to do in the other.
    Their `ratio_to_lora` weighs both kinds of step, and adds the adjustments, as they occur in a run of `run_steps` at
    the paper's median schedule, or the method's own; `ratio_by_kind` has the two apart. Of a method whose size changes
    (wide, prune) the sizes of the measured steps are told.

    Raises:
        ValueError: an unknown model or method, or a run too short for an adjustment.
    """
    setting = setting or Setting()
    specs = {text: None if text in (FLOOR, DIRECT) else parse_method(text) for text in methods}
    every: dict[str, MethodSpec | None] = {"lora": parse_method("lora"), FLOOR: None, **specs}
    runs = {text: run_schedule(spec, setting.run_steps) for text, spec in specs.items() if spec and spec.moves_ranks}
    dtype = getattr(torch, setting.dtype)
    known = [bench_model(name, dtype).with_batch(setting.batch, setting.length) for name in models]  # all told at once
    shared = {**asdict(setting), "threads": torch.get_num_threads()}
    for name, model in zip(models, known, strict=True):
        built = {text: build(text, spec, model, setting) for text, spec in every.items()}
        batch = {key: value.to(setting.device) for key, value in model.example().items()}
        seconds, adjustments, peaks = measure(built, batch, setting)
        for text in specs:
            variant = built[text]
            row = {"model": name, "variant": text, **_row(variant, seconds, adjustments[text], runs.get(text))}
            trained = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
            row |= {"peak_bytes": peaks[text], "trainable_parameters": trained}
            yield {**shared, **row, "batch": model.batch, "length": model.length}


def run_schedule(spec: MethodSpec, total_steps: int) -> Schedule:
    """The adjustments of a run at the schedule that the spec gives, or, where it gives none, the paper's median."""
    settings = RankSettings(**{name: value for name, value in spec.rank.items() if name in SCHEDULE})
    return resolve_schedule(total_steps, **{name: getattr(settings, name) for name in SCHEDULE})


class Variant:
    """One way to train; `step` runs one optimizer step and says how long it took."""

    allocator: RankAllocator | None = None

    def __init__(self, name: str, model: Any, optimizer: torch.optim.Optimizer) -> None:
        self.name, self.model, self.optimizer = name, model, optimizer
        self.observed: list[bool] = []
        """Whether the method observed each timed step."""

    def step(self, batch: dict[str, Tensor], clock: Callable[[], float]) -> tuple[float, float | None]:
        """Seconds of one training step, and of the adjustment that followed it, if one did."""
        began = clock()
        self.begin_step()
        self.model(**batch).loss.backward()
        self.before_step()
        self.optimizer.step()
        self.stepped()
        self.optimizer.zero_grad()
        stepped = clock()
        adjusted = self.after_step()
        ended = clock()
        return (stepped - began, ended - stepped) if adjusted else (ended - began, None)

    def begin_step(self) -> None:
        """Before the forward pass."""

    def before_step(self) -> None:
        """Gradients are complete."""

    def stepped(self) -> None:
        """Between the optimizer's step and the clearing of the gradients."""

    def after_step(self) -> bool:
        """What the method does after the optimizer; returns whether it adjusted ranks."""
        return False

    def state(self) -> Iterable[Tensor]:
        """The tensors that the method keeps from step to step beside the optimizer's."""
        return ()


class MethodVariant(Variant):
    """A method of the registry: what `pedyra.methods.loop` does around a step, in pieces, for adjustments are timed
    apart."""

    def __init__(self, name: str, adaptation: Adaptation, setting: Setting) -> None:
        model = _trained(adaptation.model, setting)
        super().__init__(name, model, make_optimizer(adaptation, torch.optim.AdamW, lr=LR, fused=True))
        self.hooks: Hooks = adaptation.hooks
        self.taken = 0
        if adaptation.ranks is not None:
            self.allocator = RankAllocator(self.model, self.optimizer, adaptation.ranks, setting.total_steps)
        steps = setting.total_steps
        self.hooks.begin(Running(total_steps=steps, optimizer=self.optimizer, allocator=self.allocator))

    def begin_step(self) -> None:
        self.hooks.step_begins(self.taken)

    def before_step(self) -> None:
        if self.allocator is not None:
            self.allocator.before_step()
        self.hooks.gradients_complete()

    def stepped(self) -> None:
        self.hooks.stepped(self.taken)
        self.taken += 1

    def after_step(self) -> bool:
        return self.allocator is not None and self.allocator.after_step() is not None

    def state(self) -> Iterable[Tensor]:
        if self.allocator is not None:
            return self.allocator.run.tensors().values()
        scores = getattr(self.model.base_model, "rankallocator", None)  # PEFT's AdaLoRA
        kept = (scores.ipt, scores.exp_avg_ipt, scores.exp_avg_unc) if scores is not None else ()
        return [tensor for each in kept for tensor in each.values()]


class DirectVariant(Variant):
    """PE-DyRA built in AdaLoRA's manner: ranks start at 1.5 r, masked."""

    def __init__(self, model: BenchModel, setting: Setting) -> None:
        config = AdaLoraConfig(
            task_type=model.task_type, target_modules="all-linear", exclude_modules=model.exclude,
            init_r=round(1.5 * setting.rank), target_r=setting.rank, lora_alpha=2 * setting.rank,
            total_step=setting.total_steps, orth_reg_weight=0.1,
        )  # fmt: skip
        adapted = _trained(get_peft_model(model.build(), config), setting)  # type: ignore[arg-type]
        super().__init__(DIRECT, adapted, _adamw(adapted))
        self.reference = MaskedReference(adapted, rank=setting.rank, interval=setting.schedule["interval"])
        self.before_step, self.after_step = self.reference.observe, self.reference.adjust
        self.state = self.reference.tensors


def build(text: str, spec: MethodSpec | None, model: BenchModel, setting: Setting) -> Variant:
    """A method, or what stands beside them, on its own copy of the same base model."""
    if text == DIRECT:
        return DirectVariant(model, setting)
    lora = LoraConfig(
        task_type=model.task_type, r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear",
        exclude_modules=model.exclude,
    )  # fmt: skip
    if spec is None:
        return _floor(get_peft_model(model.build(), lora), setting)  # type: ignore[arg-type]
    base = model.build()
    examples = [model.example(seed) for seed in range(8)]
    request = Request(
        method=spec.name,
        model=base,
        lora=configured(lora, spec.lora, base),
        rank={**spec.rank, **setting.schedule},
        settings=spec.settings,
        steps=setting.total_steps,
        data=Data(batches=lambda: iter(examples), loss=model_loss),
    )
    return MethodVariant(text, get_method(spec.name).prepare(request), setting)


def _floor(model: Any, setting: Setting) -> Variant:
    """No adapter at work, but gradients that flow through the whole base: the least that any LoRA can cost."""
    model = _trained(model, setting)
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save.default" in name)
    model.enable_input_require_grads()
    return Variant(FLOOR, model, _adamw(model))


def _trained(model: Any, setting: Setting) -> Any:
    """The model on its device, ready to be trained."""
    return model.to(setting.device).train()


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """The Trainer's default optimizer; AdamW's own default is a loop over the parameters on a CPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained or [nn.Parameter(torch.zeros(1))], lr=LR, fused=True)


def measure(
    built: dict[str, Variant], batch: dict[str, Tensor], setting: Setting
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, int]]:
    """Seconds of every step after the warm-up, of every adjustment, and the peak memory, by method."""
    seconds: dict[str, list[float]] = {name: [] for name in built}
    adjustments: dict[str, list[float]] = {name: [] for name in built}
    peaks: dict[str, int] = {}
    order = Random(0)
    for round_ in range(setting.total_steps):
        # In another order each time: what a step leaves in caches and the allocator is the next one's to bear.
        for name, variant in order.sample(list(built.items()), len(built)):
            if variant.allocator is not None and round_ >= _WARMUP:
                variant.observed.append(variant.allocator.tracks(variant.allocator.step + 1))
            step, adjustment = variant.step(batch, setting.now)
            if round_ >= _WARMUP:
                seconds[name].append(step)
            if adjustment is not None:
                adjustments[name].append(adjustment)
        if round_ == _WARMUP + 1:  # while PE-DyRA observes
            peaks = {name: peak_bytes(variant, batch, setting.device) for name, variant in built.items()}
    return seconds, adjustments, peaks


def peak_bytes(variant: Variant, batch: dict[str, Tensor], device: str) -> int:
    """The most memory a step needs: parameters, gradients, optimizer and score state, and what autograd saves.

    On a CPU every storage counts once and temporaries within one operation are not seen. On a GPU it is
    `max_memory_allocated`, less what other variants hold.
    """
    variant.model(**batch).loss.backward()  # gradients exist, as they do when the next forward ends at its peak
    held = storages(_static(variant))
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.model(**batch).loss.backward()
        peak = sum(held.values()) + torch.cuda.max_memory_allocated() - before
    else:

        def count(tensor: Tensor) -> Tensor:
            held.update(storages([tensor]))
            return tensor.detach()  # an output saved as it is would hold its own graph for ever

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = variant.model(**batch).loss
        peak = sum(held.values())
        del loss
    variant.optimizer.zero_grad()
    return peak


def _static(variant: Variant) -> Iterable[Tensor]:
    """What lives from step to step."""
    model: nn.Module = variant.model
    yield from model.parameters()
    yield from model.buffers()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    states: list[dict[str, Any]] = list(variant.optimizer.state.values())
    yield from (value for state in states for value in state.values() if isinstance(value, Tensor))
    yield from variant.state()


def observed_steps(run: Schedule, window: int) -> int:
    """How many steps of a run are observed: the last `window` of them before each adjustment, and its own."""
    ahead = ((run.next_adjustment(step), step) for step in range(1, run.total_steps + 1))
    return sum(adjustment is not None and adjustment - step < window for adjustment, step in ahead)


def over_a_run(ratios: Mapping[str, float], adjustment: float, run: Schedule, window: int) -> float:
    """The mean ratio of the steps of a run, with its adjustments.

    Args:
        ratios: of a step of each kind.
        adjustment: what one takes, in steps of what the ratios refer to.
        window: steps that are observed before an adjustment.
    """
    count = observed_steps(run, window)
    steps = count * ratios["observed"] + (run.total_steps - count) * ratios["idle"]
    return (steps + len(run.adjustments) * adjustment) / run.total_steps


def _row(
    variant: Variant, seconds: dict[str, list[float]], adjustments: list[float], run: Schedule | None
) -> dict[str, Any]:
    own, adjustment = seconds[variant.name], median(adjustments) if adjustments else None
    row: dict[str, Any] = {"adjustment_seconds": adjustment, "step_seconds": median(own)}
    for other in ("lora", FLOOR):
        theirs = seconds[other]
        ratios = [a / b for a, b in zip(own, theirs, strict=True)]
        row[f"ratio_to_{other}"] = median(ratios)
        if other == "lora":
            low, _, high = quantiles(ratios, n=4)
            row |= {"ratio_quartiles": [low, high], "spread": f"{low:.3f} to {high:.3f}"}
        if variant.allocator is not None:
            assert run is not None
            by_kind = _by_kind(variant.observed, ratios)
            window: int = variant.allocator.run.window  # type: ignore[attr-defined]
            row[f"ratio_to_{other}"] = over_a_run(by_kind, (adjustment or 0.0) / median(theirs), run, window)
            if other == "lora":
                row["ratio_by_kind"] = by_kind
    return row


def _by_kind(observed: Sequence[bool], ratios: Sequence[float]) -> dict[str, float]:
    """The median ratio of each of `KINDS`."""
    pairs = list(zip(observed, ratios, strict=True))
    return {kind: median(ratio for seen, ratio in pairs if seen is (kind == "observed")) for kind in KINDS}
