"""A step's batch run again: the loss that is trained, and nothing else, whatever model, loss and loop there are."""

from __future__ import annotations

import copy
import inspect
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pedyra import RankAllocator, RankConfig
from pedyra.allocate.distributed import one_process
from pedyra.allocate.mean_loss import expect_mean_loss
from pedyra.fitting.gramians import Gramians
from pedyra.lora.attach import attach
from pedyra.methods.pedyra.batches import Batches

IDS = torch.arange(3, 27).view(4, 6)
CLASSES = torch.tensor([0, 1, 1, 0])


class Watched:
    """A PEFT model whose steps are seen as fit sees them."""

    def __init__(self, model: Any) -> None:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
        self.model, self.layers = model, attach(model.double())
        self.batches = Batches(model, one_process)
        self.batches.wanted = True
        self.gramians = Gramians({layer.name: layer.a.A for layer in self.layers}, blocks=1)
        for layer in self.layers:
            layer.a.observer = self.gramians.observer(layer.name)

    def slope(self) -> float:
        """Of the gates of all directions together, from the backward passes so far."""
        self.gramians.close(self.batches.samples, self.batches.loss_scale(1.0, None))
        return sum(float(K.trace()) for K in self.gramians.last()[0].values())

    def derivative(self) -> float:
        """The same by central differences."""
        gates = [{layer: z * torch.eye(layer.rank) for layer in self.layers} for z in (1.004, 0.996)]
        _, up, down, _ = self.batches.losses(None, *gates)
        return (up - down) / 0.008


def classify(model: Any, **more: Any) -> Any:
    return model(input_ids=IDS, labels=CLASSES, **more)


def undivided(model: Any) -> None:
    for rows in (slice(0, 2), slice(2, 4)):
        model(input_ids=IDS[rows], labels=CLASSES[rows]).loss.backward()


def evaluated(model: Any) -> None:
    classify(model).loss.backward()
    model.eval()(input_ids=IDS.flip(0), labels=CLASSES)  # by a loop that forgets no_grad
    model.train()


def outside(model: Any) -> None:
    (3 * nn.functional.cross_entropy(classify(model).logits, CLASSES)).backward()


STEPS: dict[str, Any] = {
    "a label in a column": lambda model: model(input_ids=IDS, labels=CLASSES[:, None]).loss.backward(),
    "a tuple": lambda model: classify(model, return_dict=False)[0].backward(),
    "a scaled loss": lambda model: (classify(model).loss * 3).backward(),
    "the same loss from other outputs": outside,
    "micro-batches that are added up": undivided,
    "an evaluation in between": evaluated,
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_a_slope_is_the_derivative_of_the_loss_over_the_rows_of_the_step(step, make_bert):
    watched = Watched(make_bert())
    step(watched.model)
    assert float(watched.batches.samples) == 4
    assert watched.slope() == pytest.approx(watched.derivative(), rel=2e-2, abs=2e-5)


def test_a_plain_dict_has_its_loss(make_bert):
    watched = Watched(make_bert())
    base = watched.model.get_base_model()
    forward = base.forward
    base.forward = lambda **batch: dict(forward(**batch))
    classify(watched.model)["loss"].backward()
    assert watched.slope() == pytest.approx(watched.derivative(), rel=2e-2, abs=2e-5)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        ("AlbertForSequenceClassification", {"labels": CLASSES}),  # each layer is called three times
        ("BertForQuestionAnswering", {"start_positions": CLASSES, "end_positions": CLASSES}),
        ("BertForTokenClassification", {"labels": torch.where(IDS % 6 == 1, -100, IDS % 2)}),
        ("T5ForConditionalGeneration", {"labels": IDS[:, :2].contiguous()}),
    ],
)
def test_a_slope_is_that_of_every_kind_of_loss(name, batch, make_tiny):
    watched = Watched(make_tiny(name))
    watched.model(input_ids=IDS, **batch).loss.backward()
    assert watched.slope() == pytest.approx(watched.derivative(), rel=2e-2, abs=2e-5)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForSequenceClassification"])
def test_a_model_that_is_told_a_number_of_items_may_divide_by_it_or_not(name, make_tiny):
    """Trainer counts every label of GPT-2, also the first of a row, which nothing predicts."""
    watched = Watched(make_tiny(name))
    trainer: Any = SimpleNamespace(
        model_accepts_loss_kwargs=True, is_world_process_zero=lambda: False,
        args=SimpleNamespace(torch_compile=False, gradient_accumulation_steps=2, world_size=1),
    )  # fmt: skip
    expect_mean_loss(trainer, watched.model)
    labels = IDS if name.startswith("GPT2") else CLASSES
    for rows in (slice(0, 2), slice(2, 4)):  # by a Trainer's training_step
        given = {"num_items_in_batch": torch.tensor(labels.numel())} if trainer.model_accepts_loss_kwargs else {}
        loss = watched.model(input_ids=IDS[rows], labels=labels[rows], **given).loss
        (loss if trainer.model_accepts_loss_kwargs else loss / 2).backward()
    assert watched.slope() == pytest.approx(watched.derivative(), rel=2e-2, abs=2e-5)


def test_rows_count_where_a_model_has_no_head(make_tiny):
    watched = Watched(make_tiny("BertModel"))
    first, second = (watched.model(input_ids=ids).last_hidden_state.mean(1) for ids in (IDS, IDS.flip(1)))
    nn.functional.cross_entropy(first @ second.T, torch.arange(4)).backward()
    assert float(watched.batches.samples) == 8  # of two views


def test_a_loss_that_draws_changes_no_random_number_and_draws_alike(make_bert):
    watched = Watched(make_bert())
    classify(watched.model).loss.backward()
    before = torch.get_rng_state()
    whole = {layer: torch.eye(layer.rank) for layer in watched.layers}
    first, second, _ = watched.batches.losses(lambda: classify(watched.model).loss * torch.rand(()), whole)
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("trains", [True, False])
def test_no_graph_is_kept(trains, make_bert):
    """Of an evaluation that forgets no_grad not even till the end of the step."""
    watched = Watched(make_bert())
    output = classify(watched.model.train(trains))
    loss = weakref.ref(output.loss)
    if trains:
        output.logits.sum().backward()
        watched.batches.forget()
    del output
    assert loss() is None


def test_a_model_can_be_pickled_and_a_copy_is_not_seen(make_bert):
    watched = Watched(make_bert())
    pickle.loads(pickle.dumps(watched.model))
    classify(copy.deepcopy(watched.model)).loss.backward()
    assert float(watched.batches.samples) == 0


@pytest.mark.parametrize("rows", [16, 512])  # of 24 that there are
def test_the_same_loss_from_the_logits_is_the_model_s_own(make_llama, monkeypatch, rows):
    monkeypatch.setattr("pedyra.methods.pedyra.batches.COMPARED", rows)
    watched = Watched(make_llama())
    output = watched.model(input_ids=IDS, labels=IDS)
    logits = output.logits[:, :-1].flatten(0, 1)
    (3 * nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())).backward()
    watched.batches.check(None)
    assert float(watched.batches.loss_scale(1.0, None)) == pytest.approx(3)


class TestRefusals:
    @pytest.fixture(autouse=True)
    def run(self, make_bert):
        self.model = make_bert()
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=0.1)
        self.allocator = RankAllocator(self.model, optimizer, RankConfig(), total_steps=100)

    def test_another_loss_than_the_model_s_own(self):
        nn.functional.cross_entropy(classify(self.model).logits, CLASSES, torch.tensor([1.0, 5.0])).backward()
        with pytest.raises(ValueError, match="compares the model's own loss, but another one is trained"):
            self.allocator.before_step()

    def test_a_model_inside_the_one_that_is_watched(self):
        base = self.model.get_base_model()
        classify(base).loss.backward()
        with pytest.raises(ValueError, match="saw no forward pass of the model in this step"):
            self.allocator.before_step(closure=lambda: classify(base).loss)

    def test_a_cache_that_would_grow(self, make_llama):
        from transformers import DynamicCache

        model = make_llama()
        allocator = RankAllocator(model, torch.optim.SGD(model.parameters(), lr=0.1), RankConfig(), total_steps=100)
        names = inspect.signature(model.get_base_model().forward).parameters
        cache = {"cache" if "cache" in names else "past_key_values": DynamicCache()}
        model(input_ids=IDS, labels=IDS, use_cache=True, **cache).loss.backward()
        with pytest.raises(ValueError, match="a cache of keys grows when a batch is run again"):
            allocator.before_step()
