"""What the speed benchmarks compare: each variant is a model, its optimizer, and what its method adds to a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import AdaLoraConfig, EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from torch import Tensor, nn

from pedyra.allocate.rank_allocator import RankAllocator
from pedyra.lab.bench.bench_models import BenchModel
from pedyra.lab.bench.masked_reference import MaskedReference
from pedyra.pe_dyra.method import PeDyra

VARIANTS = (
    *("floor", "lora", "adalora", "dora", "direct"),
    *("pedyra", "pedyra-fused", "pedyra-alpha1", "pedyra-alpha1-fused"),
)
EVA = "eva"
"""Not among the defaults: a step of EVA is one of LoRA; it differs by its ranks and its initialisation, which is what
`adjustment_seconds` then has. PEFT's cannot run over DeBERTa."""

Clock = Callable[[], float]


@dataclass
class Variant:
    """One way to train; `step` runs one optimizer step and says how long it took."""

    name: str
    model: Any
    optimizer: torch.optim.Optimizer
    before_step: Callable[[], None] = lambda: None
    stepped: Callable[[], None] = lambda: None
    """Between the optimizer's step and the clearing of the gradients."""
    after_step: Callable[[], bool] = lambda: False
    """What the method does after the optimizer; returns whether it adjusted ranks."""
    state: Callable[[], Iterable[Tensor]] = lambda: ()
    """The tensors that the method keeps from step to step beside the optimizer's."""
    allocator: RankAllocator | None = None
    setup_seconds: float | None = None
    observed: list[bool] = field(default_factory=list)
    """Whether PE-DyRA observed each timed step."""

    def step(self, batch: dict[str, Tensor], clock: Clock) -> tuple[float, float | None]:
        """Seconds of one training step, and of the adjustment that followed it, if one did."""
        began = clock()
        self.model(**batch).loss.backward()
        self.before_step()
        self.optimizer.step()
        self.stepped()
        self.optimizer.zero_grad()
        stepped = clock()
        adjusted = self.after_step()
        ended = clock()
        return (stepped - began, ended - stepped) if adjusted else (ended - began, None)

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training changes, now."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all variants of one benchmark share."""

    model: BenchModel
    rank: int = 8
    device: str = "cpu"
    gradient_checkpointing: bool = False
    config: PeDyra
    """Settings of pedyra, with the schedule of the measured steps in integers."""
    total_steps: int
    """Measured steps, warm-up included; the schedule of every dynamic method spans them."""

    def tensors(self) -> dict[str, Tensor]:
        """The batch of every step, on the device."""
        return {name: value.to(self.device) for name, value in self.model.example().items()}


def build(name: str, setting: Setting, clock: Clock) -> Variant:
    """A variant by its name; each gets its own copy of the same base model.

    Raises:
        ValueError: an unknown name.
    """
    if name not in (*VARIANTS, EVA):
        raise ValueError(f"variant {name!r} is unknown; choose from {', '.join((*VARIANTS, EVA))}")
    if name in ("adalora", "direct"):
        return _masked(name, setting)
    model = _adapted(setting, _lora(setting, use_dora=name == "dora") if name != EVA else _eva(setting))
    if name == "floor":
        return _floor(model)
    if name == EVA:
        began = clock()
        initialize_lora_eva_weights(model, dataloader=_batches(setting), show_progress_bar=False)
        return Variant(name, model, _adamw(model), setup_seconds=clock() - began)
    variant = Variant(name, model, _adamw(model))
    if name.startswith("pedyra"):
        alpha = 1.0 if "alpha1" in name else setting.config.alpha
        config = replace(setting.config, fused=name.endswith("fused"), alpha=alpha)
        allocator = RankAllocator(model, variant.optimizer, config, setting.total_steps)
        variant.allocator, variant.before_step = allocator, allocator.before_step
        variant.after_step = lambda: allocator.after_step() is not None
        variant.state = lambda: allocator.run.tensors().values()
    return variant


def _floor(model: Any) -> Variant:
    """No adapter at work, but gradients that flow through the whole base: the least that any LoRA can cost."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    model.base_model.disable_adapter_layers()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save.default" in name)
    model.enable_input_require_grads()
    return Variant("floor", model, _adamw(model))


def _masked(name: str, setting: Setting) -> Variant:
    """PEFT's AdaLoRA as its documentation calls it, and PE-DyRA built in its manner; ranks start at 1.5 r, masked."""
    schedule, steps = setting.config, setting.total_steps
    config = AdaLoraConfig(
        task_type=setting.model.task_type, target_modules="all-linear", exclude_modules=setting.model.exclude,
        init_r=round(1.5 * setting.rank), target_r=setting.rank, lora_alpha=2 * setting.rank, total_step=steps,
        tinit=int(schedule.initial_warmup or 0), tfinal=int(schedule.final_warmup), deltaT=int(schedule.interval),
        orth_reg_weight=0.1 if name == "direct" else 0.5,
    )  # fmt: skip
    model = _adapted(setting, config)
    variant = Variant(name, model, _adamw(model))
    if name == "direct":
        reference = MaskedReference(model, rank=setting.rank, interval=int(schedule.interval))
        variant.before_step, variant.after_step, variant.state = reference.observe, reference.adjust, reference.tensors
        return variant
    scores, done = model.base_model.rankallocator, itertools.count(1)
    variant.stepped = lambda: model.base_model.update_and_allocate(next(done))
    variant.state = lambda: [*scores.ipt.values(), *scores.exp_avg_ipt.values(), *scores.exp_avg_unc.values()]
    return variant


def _lora(setting: Setting, **more: Any) -> LoraConfig:
    return LoraConfig(
        task_type=setting.model.task_type, r=setting.rank, lora_alpha=2 * setting.rank, target_modules="all-linear",
        exclude_modules=setting.model.exclude, **more,
    )  # fmt: skip


def _eva(setting: Setting) -> LoraConfig:
    return _lora(setting, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))


def _adapted(setting: Setting, config: LoraConfig) -> Any:
    model: Any = get_peft_model(setting.model.build(), config)  # type: ignore[arg-type]
    if setting.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(setting.device).train()


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    """The Trainer's default optimizer; AdamW's own default is a loop over the parameters on a CPU."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained or [nn.Parameter(torch.zeros(1))], lr=1e-4, fused=True)


def _batches(setting: Setting) -> list[dict[str, Tensor]]:
    """The data that EVA's initialisation runs over; it takes labels for a language model's, so none are given."""
    examples = [setting.model.example(seed) for seed in range(8)]
    return [{name: t.to(setting.device) for name, t in ex.items() if name != "labels"} for ex in examples]
