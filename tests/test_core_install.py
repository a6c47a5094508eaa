"""`pip install pedyra` brings torch, peft and transformers: enough to train with the callback, not for `pedyra`."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

from pedyra.__main__ import NEEDED

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
WITHOUT = """
import sys

# What the extras bring and torch, peft and transformers do not.
ABSENT = set("altair datasets pydantic pydantic_core rich ruamel sklearn typer vl_convert".split())
ABSENT |= set("bitsandbytes gguf math_verify ray rouge_score tensorboard trl".split())

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ABSENT else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
TRAIN = """
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
from pedyra import PeDyra, adapt

def base():
    torch.manual_seed(0)
    shape = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    return BertForSequenceClassification(BertConfig(**shape, max_position_embeddings=8))

model = get_peft_model(base(), LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["query", "value"]))
rows = [dict(input_ids=torch.tensor([n % 20, 3]), labels=n % 2) for n in range(16)]
arguments = TrainingArguments(sys.argv[1], max_steps=13, use_cpu=True, report_to="none", save_strategy="no",
                              per_device_train_batch_size=4, dataloader_pin_memory=False, label_names=["labels"])
trainer = Trainer(model, arguments, train_dataset=rows)
handle = adapt(trainer, PeDyra.as_published(interval=2, initial_warmup=1, final_warmup=1))
trainer.train()
model.save_pretrained(sys.argv[1])
PeftModel.from_pretrained(base(), sys.argv[1])
print(sum(handle.allocator.ranks.values()), sorted(ABSENT & set(sys.modules)))
"""
VERBS = (
    TRAIN
    + """
import warnings
from pathlib import Path
import pedyra

for name in pedyra.__all__:
    getattr(pedyra, name)
out = Path(sys.argv[1]) / "written"
base().save_pretrained(out / "base")
warnings.simplefilter("ignore")  # of few rows
pedyra.detach(model)
result = pedyra.fit(trainer, data=rows * 6, rank=1)
result.save(out / "fit", for_="vllm")
proof = pedyra.prove(trainer, "default", out / "fit", data=rows * 6, margin="1%")
for target in ("peft", "padded", "merged"):
    source = model if target == "peft" else out / "fit"
    pedyra.export_adapter(source, target, out / target, **({"base": out / "base"} if target == "merged" else {}))
merged = BertForSequenceClassification.from_pretrained(out / "merged")
print(result.chosen.rank, sorted(path.name for path in out.iterdir()), sorted(ABSENT & set(sys.modules)))
"""
)


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", WITHOUT + script, *arguments], capture_output=True, text=True)


def test_adapt_trains_and_saves_without_what_the_command_line_adds(tmp_path):
    done = run(TRAIN, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "4 []"


def test_every_public_name_and_verb_is_there_without_the_extras(tmp_path):
    done = run(VERBS, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "1 ['base', 'fit', 'merged', 'padded', 'peft'] []"


def test_the_command_line_tells_how_it_is_installed():
    done = run("from pedyra.__main__ import main; main()")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: the command line needs altair, datasets, pydantic, ")
    assert done.stderr.endswith('; run in a checkout: pip install ".[cli]"\n') and done.stderr.count("\n") == 1


def test_what_the_command_line_looks_for_is_the_extra():
    (listed,) = re.findall(r"^cli = (\[.*?^\])", PYPROJECT.read_text(), re.MULTILINE | re.DOTALL)
    modules = {"ruamel.yaml": "ruamel", "scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}
    names = [re.split(">=", requirement)[0] for requirement in ast.literal_eval(listed)]
    assert sorted(modules.get(name, name) for name in names) == sorted(NEEDED)
