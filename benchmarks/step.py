"""`python -m benchmarks.step` times a training step, against PEFT's methods and against no adapter at all.

All methods train in one process, one step each in random order, so that whatever else the machine does hits all alike;
a ratio is the median over rounds of a method's step by LoRA's (or the floor's) of the same round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from random import Random
from statistics import median, quantiles
from typing import Annotated, Any, Literal

import torch
import typer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from benchmarks.command import JsonFile, Smoke, Threads, command_line, methods_option, print_rows
from benchmarks.loop import Loop, make_optimizer
from benchmarks.models import BenchModel, bench_model
from benchmarks.rows import RowFile
from benchmarks.spec import MethodSpec, parse_method
from pedyra.allocate.contract import BatchLoss, Training, Work
from pedyra.allocate.schedule import Schedule, resolve_schedule
from pedyra.errors import UserError
from pedyra.methods.names import make_method, setting_names
from pedyra.methods.registry import changed, get_method

STEP_KEY = (
    "model", "variant", "compile", "rounds", "batch", "length", "dtype", "device", "cpu_time", "threads", "rank",
    "run_steps",
)  # fmt: skip
SCHEDULE = ("interval", "initial_warmup", "final_warmup")
FLOOR = "floor"
"""A model without an adapter at work, timed beside the methods."""
DEFAULT = (FLOOR, "lora", "adalora", "dora", "pedyra", "pedyra:alpha=1.0")
KINDS = ("observed", "idle")
"""A method observes some of its steps."""
LEAST_ROUNDS = 8
"""Fewer of each kind would have no adjustment after every fourth part of the observed ones."""
RUN_STEPS = 1000
"""The mean step is told of a run of this length."""
RANK, LR = 8, 1e-4
_WARMUP = 3


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Steps are timed in one way for every model and method."""

    rounds: int = 20
    """Timed steps that a method observes; as many more are idle."""
    batch: int | None = None
    """Rows of a step; None: the model's."""
    length: int | None = None
    """Tokens of a row; None: the model's."""
    dtype: str = "float32"
    device: str = "cpu"
    cpu_time: bool = False
    """Count processor time, for a machine that others use, with one thread."""
    compile: bool = False
    """Have torch compile the model of every variant."""

    def __post_init__(self) -> None:
        if self.rounds < LEAST_ROUNDS:
            raise UserError(f"rounds is {self.rounds}; what is measured takes at least {LEAST_ROUNDS}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device is 'cuda', but this machine has no CUDA device; use --device cpu")

    @property
    def total_steps(self) -> int:
        """Return the measured steps, warm-up included; the schedule of every method spans them."""
        return _WARMUP + 2 * self.rounds

    @property
    def schedule(self) -> dict[str, int]:
        """Have `rounds` steps observed, with adjustments among them, and `rounds` not."""
        return {"initial_warmup": _WARMUP, "interval": self.rounds // 4, "final_warmup": self.rounds - 1}

    def now(self) -> float:
        """Return seconds: of the processor's clock, which other work does not stop, or of the wall's; on a GPU of the
        wall's, once the GPU is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time and self.device != "cuda" else time.perf_counter()


def step(
    models: Annotated[
        list[str] | None, typer.Argument(help="minilm, or llama-WIDTHxDEPTH.", show_default="minilm")
    ] = None,
    methods: Annotated[
        list[str] | None, methods_option("floor, lora, adalora, dora; pedyra with alpha 0.5 and 1")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="So many observed steps are timed, and as many idle ones.", show_default="20")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    length: Annotated[int | None, typer.Option(min=1, show_default="the model's")] = None,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option()] = "float32",
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="Processor time, for a machine that others use.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="All variants compiled by torch.")] = False,
    threads: Threads = None,
    smoke: Smoke = False,
    json_file: JsonFile = None,
) -> None:
    """Time one training step of PE-DyRA against PEFT's methods, step by step in turn."""
    file = RowFile(json_file, STEP_KEY)
    if smoke:
        models, batch, length = models or ["llama-32x1"], batch or 2, length or 16
    if rounds is None:
        rounds = LEAST_ROUNDS if smoke else 20
    shape = {"batch": batch, "length": length, "dtype": dtype}
    timing = Timing(rounds=rounds, **shape, device=device, cpu_time=cpu_time, compile=compile)
    rows = list(file.keep(bench_step(models or ["minilm"], methods or DEFAULT, timing)))
    for row in rows:
        row["quartiles"] = "{:.3f} to {:.3f}".format(*row["ratio_quartiles"])
        row |= row.get("ratio_by_kind", {})
    columns = ("model", "variant", "ratio_to_lora", "quartiles", *KINDS, "ratio_to_floor", "peak_bytes")
    print_rows(rows, [*columns, "trainable_parameters", "adjustment_seconds"])


def bench_step(
    models: Sequence[str], methods: Sequence[str] = DEFAULT, timing: Timing | None = None
) -> Iterator[dict[str, Any]]:
    """Yield a row per model and method, as each model is done.

    PE-DyRA and its like observe the first `rounds` steps, with four adjustments, and have nothing to do in the other.
    Their `ratio_to_lora` weighs both kinds of step, and adds the adjustments, as they occur in a run of `RUN_STEPS` at
    its own schedule; `ratio_quartiles` weigh the quartiles of both kinds alike, and
    `ratio_by_kind` has their medians apart. Of a method whose size changes (prune) the sizes of the measured
    steps are told.

    Raises:
        ValueError: an unknown model or method, or a run too short for an adjustment.
    """
    timing = timing or Timing()
    specs = {text: None if text == FLOOR else parse_method(text) for text in methods}
    every: dict[str, MethodSpec | None] = {"lora": parse_method("lora"), FLOOR: None, **specs}
    runs = {text: run_schedule(spec) for text, spec in specs.items() if spec and spec.moves_ranks}
    dtype = getattr(torch, timing.dtype)
    # All of them first, so that a wrong name is told before any long work.
    sized = [bench_model(name, dtype).with_batch(timing.batch, timing.length) for name in models]
    for model in sized:
        built = {text: build(spec, model, timing) for text, spec in every.items()}
        peaks = measure(built, {key: value.to(timing.device) for key, value in model.example().items()}, timing)
        for text in specs:
            variant = built[text]
            row = {"model": model.name, "variant": text}
            row |= _ratios(variant, built["lora"], built[FLOOR], runs.get(text))
            parameters = sum(p.numel() for p in variant.model.parameters() if p.requires_grad)
            row |= {"peak_bytes": peaks[text], "trainable_parameters": parameters}
            shared = {**asdict(timing), "rank": RANK, "run_steps": RUN_STEPS, "threads": torch.get_num_threads()}
            yield {**shared, **row, "batch": model.batch, "length": model.length}


def run_schedule(spec: MethodSpec, total_steps: int = RUN_STEPS) -> Schedule:
    """Return the adjustments of a run at the schedule of the spec, or, where it says none, of its method's defaults."""
    settings = make_method(spec.name, spec.settings)
    return resolve_schedule(total_steps, **{name: getattr(settings, name) for name in SCHEDULE})


class Variant:
    """One way to train, in `benchmarks.loop`, and what its steps took."""

    def __init__(self, model: Any, work: Work, timing: Timing) -> None:
        self.model: Any = model.to(timing.device).train()
        if timing.compile:
            self.model.compile()
        # The Trainer's default optimizer; AdamW's own default is a loop over the parameters on a CPU.
        self.optimizer = make_optimizer(self.model, work, torch.optim.AdamW, lr=LR, fused=True)
        self.loop = Loop(self.model, work, self.optimizer, timing.total_steps)
        self.allocator = self.loop.allocator
        self.seconds: list[float] = []
        """Seconds of each timed step, without its adjustment."""
        self.observed: list[bool] = []
        """True for each timed step that the method observed."""
        self.adjustments: list[float] = []
        """Seconds of each."""

    def step(self, batch: dict[str, Tensor], clock: Callable[[], float], *, timed: bool = True) -> None:
        """Run one training step, and the adjustment that follows it."""
        observes = self.allocator is not None and self.allocator.run.observes(self.allocator.step + 1)
        began = clock()
        self.loop.begin_step()
        self.model(**batch).loss.backward()
        self.loop.update()
        stepped = clock()
        adjusted = self.loop.adjust() is not None
        ended = clock()
        if adjusted:
            self.adjustments.append(ended - stepped)
        if timed:
            self.seconds.append((stepped if adjusted else ended) - began)
            self.observed.append(observes)

    def state(self) -> Iterable[Tensor]:
        """Return the tensors that the method keeps from step to step beside the optimizer's."""
        if self.allocator is not None:
            return self.allocator.run.tensors().values()
        scores = getattr(self.model.base_model, "rankallocator", None)  # PEFT's AdaLoRA
        averages = (scores.ipt, scores.exp_avg_ipt, scores.exp_avg_unc) if scores is not None else ()
        return [tensor for each in averages for tensor in each.values()]


def build(spec: MethodSpec | None, model: BenchModel, timing: Timing) -> Variant:
    """Put a method, or the floor (None), on its own copy of the same base model."""
    base: Any = model.build()
    lora = LoraConfig(
        task_type=model.task_type, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear",
        exclude_modules=model.exclude,
    )  # fmt: skip
    if spec is None:
        return Variant(_floor(get_peft_model(base, lora)), Work(), timing)
    entry, known = get_method(spec.name), setting_names(spec.name)
    beginning = entry.at_budget(RANK)
    lora = changed(lora, r=beginning.r, lora_alpha=2 * RANK * beginning.alpha)
    schedule = {name: value for name, value in timing.schedule.items() if name in known}
    adapted, method = entry.begin(base, lora, {**beginning.settings, **spec.settings, **schedule})
    training = Training(
        steps=lambda: timing.total_steps,
        batches=lambda: _losses(model),
        losses=lambda part: (_losses(model), _losses(model)),
    )
    return Variant(adapted, Work() if method is None else method.install(adapted, training=training), timing)


def _losses(model: BenchModel) -> Iterator[BatchLoss]:
    """Yield losses on examples without end."""
    return (partial(_loss, batch=batch) for batch in cycle([model.example(seed) for seed in range(8)]))


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss


def _floor(model: Any) -> Any:
    """Let gradients flow through the whole base with no adapter at work: the least that any LoRA can cost."""
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save.default" in name)
    model.enable_input_require_grads()
    return model


def measure(built: Mapping[str, Variant], batch: dict[str, Tensor], timing: Timing) -> dict[str, int]:
    """Time the steps of all variants, and find the peak memory of each."""
    peaks: dict[str, int] = {}
    order = Random(0)
    for number in range(timing.total_steps):
        # In another order each time: what a step leaves in caches and the allocator is the next one's to bear.
        for variant in order.sample(list(built.values()), len(built)):
            variant.step(batch, timing.now, timed=number >= _WARMUP)
        if number == _WARMUP + 1:  # while PE-DyRA observes
            with torch.compiler.set_stance("force_eager"):  # what a compiled graph saves is seen by no hook
                peaks = {name: peak_bytes(variant, batch, timing.device) for name, variant in built.items()}
    return peaks


def peak_bytes(variant: Variant, batch: dict[str, Tensor], device: str) -> int:
    """Return the most memory a step needs: parameters, gradients, optimizer and score state, and what autograd saves.

    On a CPU every storage counts once and temporaries within one operation are not seen. On a GPU it is
    `max_memory_allocated`, less what other variants hold.
    """
    variant.model(**batch).loss.backward()  # gradients exist, as they do when the next forward ends at its peak
    static = list(_static(variant))  # kept alive: what autograd saves could have the address of one that is gone
    memory = storages(static)
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        variant.model(**batch).loss.backward()
        peak = sum(memory.values()) + torch.cuda.max_memory_allocated() - before
    else:

        def count(tensor: Tensor) -> Tensor:
            memory.update(storages([tensor]))
            return tensor.detach()  # an output saved as it is would hold its own graph for ever

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = variant.model(**batch).loss
        peak = sum(memory.values())
        del loss
    del static
    variant.optimizer.zero_grad()
    return peak


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return address -> bytes of the distinct storages behind these tensors."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def _static(variant: Variant) -> Iterable[Tensor]:
    """Yield what lives from step to step."""
    model: nn.Module = variant.model
    yield from model.parameters()
    yield from model.buffers()
    yield from (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
    states: list[dict[str, Any]] = list(variant.optimizer.state.values())
    yield from (value for state in states for value in state.values() if isinstance(value, Tensor))
    yield from variant.state()


def over_a_run(by_kind: Mapping[str, Sequence[float]], adjustment: float, run: Schedule, window: int) -> list[float]:
    """Return the mean ratio of the steps of a run, with its adjustments: of the first quartiles of each kind of step,
    of their medians, and of their third quartiles, so that what is told of a run lies between its quartiles.

    Args:
        by_kind: the quartiles of the ratios of each kind.
        adjustment: what one takes, in steps of what the ratios refer to.
        window: steps that are observed before an adjustment, its own among them.
    """
    ahead = ((run.next_adjustment(step), step) for step in range(1, run.total_steps + 1))
    count = sum(adjusted is not None and adjusted - step < window for adjusted, step in ahead)
    pairs = zip(by_kind["observed"], by_kind["idle"], strict=True)
    steps = (count * observed + (run.total_steps - count) * idle for observed, idle in pairs)
    return [(each + len(run.adjustments) * adjustment) / run.total_steps for each in steps]


def _ratios(variant: Variant, lora: Variant, floor: Variant, run: Schedule | None) -> dict[str, Any]:
    """Return the times of a row. `run`: of a method that adjusts, the schedule of the run that is told."""
    adjustment = median(variant.adjustments) if variant.adjustments else None
    row: dict[str, Any] = {"adjustment_seconds": adjustment, "step_seconds": median(variant.seconds)}
    for name, other in (("lora", lora), ("floor", floor)):
        ratios = [own / theirs for own, theirs in zip(variant.seconds, other.seconds, strict=True)]
        middle = quantiles(ratios, n=4)
        if run is not None and variant.allocator is not None:
            by_kind = quartiles_by_kind(variant.observed, ratios)
            measured: Any = variant.allocator.run
            took = (adjustment or 0.0) / median(other.seconds)
            middle = over_a_run(by_kind, took, run, measured.window)
            if other is lora:
                row["ratio_by_kind"] = {kind: quartiles[1] for kind, quartiles in by_kind.items()}
        low, row[f"ratio_to_{name}"], high = middle
        if other is lora:
            row["ratio_quartiles"] = [low, high]
    return row


def quartiles_by_kind(observed: Sequence[bool], ratios: Sequence[float]) -> dict[str, list[float]]:
    """Return the quartiles of the ratios of each of `KINDS`; the middle one is their median."""
    pairs = list(zip(observed, ratios, strict=True))
    return {kind: quantiles([ratio for seen, ratio in pairs if seen is (kind == "observed")], n=4) for kind in KINDS}


if __name__ == "__main__":
    command_line(step)
