"""A method of one's own: ranks move to the layers whose B is largest; put your scores and your moves in their place."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import pedyra
from pedyra.allocate.allocation import RankPlan, Scores
from pedyra.allocate.scored import ScheduledMethod, ScoredSituation
from pedyra.allocate.scores import ScoreState
from pedyra.pe_dyra.equations import plan_adjustment


class Norms(ScoreState):
    def triple_scores(self) -> dict[str, list[float]]:
        return {layer.name: layer.b.weight.norm(dim=0).tolist() for layer in self.layers}


@dataclass(frozen=True, kw_only=True)
class ByNorm(ScheduledMethod):
    start, scores = "lora", Norms

    def plan(self, scores: Scores, now: ScoredSituation) -> RankPlan:
        return plan_adjustment(scores, moves=2, min_rank=1, max_ranks=now.max_ranks)


def main(output_dir: str = "runs/example_own_method") -> dict[str, int]:
    config = LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 50, (256, 8)).tolist()]
    args = TrainingArguments(output_dir, max_steps=60, learning_rate=1e-2, save_strategy="no", report_to="none")
    trainer = Trainer(get_peft_model(LlamaForCausalLM(config), lora), args, train_dataset=rows)
    return (pedyra.adapt(trainer, ByNorm()), trainer.train())[0].result.ranks


if __name__ == "__main__":
    print(main())
