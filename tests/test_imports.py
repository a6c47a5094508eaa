"""Imports go one way: lora <- export <- fitting; lora <- allocate <- pe_dyra <- trainer <- methods <- app <- lab <-
benchmarks; methods <- integrations. Heavy ones come late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from arithmetic import ARITHMETIC

import pedyra

SOURCE = Path(pedyra.__file__).parent

# What the modules of each room may import of pedyra, itself aside.
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "lora": {"errors"},
    "export": {"errors", "lora"},
    "fitting": {"errors", "lora", "export"},
    "allocate": {"errors", "lora"},
    "pe_dyra": {"errors", "lora", "allocate"},
    "trainer": {"errors", "lora", "export", "fitting", "allocate", "pe_dyra"},
    "methods": {"errors", "lora", "export", "fitting", "allocate", "pe_dyra", "trainer"},
    "app": {"errors", "lora", "export", "fitting", "allocate", "pe_dyra", "trainer", "methods"},
    "integrations": {"errors", "lora", "export", "fitting", "allocate", "pe_dyra", "trainer", "methods"},
    "lab": {"errors", "lora", "export", "fitting", "allocate", "pe_dyra", "trainer", "methods", "app"},
}
# The rooms of app, from the lowest up; each may import those before it.
APP = (
    *("interrupts", "known_sets", "packaged", "yaml_file", "console", "recipe_sections", "recipe"),
    *("tasks", "models", "runs", "report", "options", "cli"),
)
# Roots that a place must not import, not even inside a function.
FOREIGN = {
    "app/report": {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors"},
    "app/recipe.py": {"torch", "transformers", "peft", "accelerate", "datasets"},
    "app/recipe_sections.py": {"torch", "transformers", "peft", "accelerate", "datasets"},
    "app/tasks": {"peft"},
}


def imported(path: Path, types: bool = False) -> set[str]:
    """Every module that the file imports, also inside functions; with `types` what is for type checkers only, too."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types and not types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            # `from package import module` is the module, not what else the package's __init__ has.
            modules = all((SOURCE.parent / f"{name.replace('.', '/')}.py").is_file() for name in inner)
            names |= inner if modules else {str(node.module), *inner}
    return names


def files(place: str) -> list[Path]:
    """The modules of a room, or the one that a path names."""
    path = SOURCE / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path if path.suffix else path.with_suffix(".py")]


def test_benchmarks_import_everything_and_nothing_imports_them():
    for path in files("."):
        assert "benchmarks" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_what_lies_below_it(room):
    for path in files(room):
        for name in imported(path):
            root, *rest = name.split(".")
            if root == "pedyra" and rest:
                assert rest[0] in BELOW[room] | {room}, f"{path.relative_to(SOURCE)} imports {name}"


@pytest.mark.parametrize("room", APP)
def test_a_room_of_app_imports_only_those_below_it(room):
    below = set(APP[: APP.index(room) + 1])
    for path in files(f"app/{room}"):
        for name in imported(path):
            if name.startswith("pedyra.app."):
                assert name.split(".")[2] in below, f"{path.relative_to(SOURCE)} imports {name}"


def test_every_room_of_app_is_listed():
    rooms = {
        path.stem for path in (SOURCE / "app").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} == set(APP)


def test_every_room_is_listed():
    rooms = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(BELOW)


def test_no_module_imports_itself_by_way_of_others():
    paths = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    below = {name: (imported(path, types=True) & paths.keys()) - {"pedyra"} for name, path in paths.items()}
    # Whoever imports nothing that is left is in no circle, and neither is whoever nothing that is left imports.
    while free := {n for n, to in below.items() if not to & below.keys() or n not in set().union(*below.values())}:
        below = {name: to for name, to in below.items() if name not in free}
    assert not below, {name: sorted(to & below.keys()) for name, to in below.items()}


@pytest.mark.parametrize("place", FOREIGN)
def test_a_place_does_not_know_what_is_none_of_its_business(place):
    for path in files(place):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & FOREIGN[place], f"{path.relative_to(SOURCE)} imports {roots & FOREIGN[place]}"


@pytest.mark.parametrize("module", ARITHMETIC)
def test_pure_functions_know_tensors_but_no_modules_files_or_clocks(module):
    path = SOURCE.parent / f"{module.replace('.', '/')}.py"
    tree = ast.parse(path.read_text())
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert "open" not in called
    names = imported(path)
    assert not {name.split(".")[0] for name in names} & {"transformers", "peft", "accelerate", "pathlib", "time", "os"}
    assert not {name for name in names if name.startswith(("torch.nn", "torch.optim"))}
    from_torch = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
    }
    assert not from_torch & {"nn", "optim"}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pedyra", ("torch", "transformers", "peft", "numpy")),
        ("import pedyra.methods.names", ("torch", "transformers", "peft", "numpy")),
        ("import pedyra.app.recipe", ("torch", "transformers", "peft", "datasets")),
        ("import pedyra.lab.cli", ("torch", "transformers", "peft", "datasets", "vl_convert")),
        ("import pedyra.app.report.page, pedyra.app.report.images", ("torch", "transformers", "peft")),
        ("import pedyra.pe_dyra.equations, pedyra.allocate.allocation", ("transformers", "peft")),
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(statement, absent):
    check = f"import sys; {statement}; loaded = [m for m in {absent!r} if m in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves():
    for name in pedyra.__all__:
        assert getattr(pedyra, name).__name__ == name
    assert dir(pedyra) == sorted(pedyra.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pedyra.nonsense  # type: ignore[attr-defined]


WITHOUT_TRAINER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("transformers.trainer"):
            raise ImportError(f"{name} is not to be had in this process")

sys.meta_path.insert(0, Refuse())
import torch
from peft import LoraConfig, get_peft_model
from pedyra import PeDyra, RankAllocator, attach, detach
from pedyra.fitting.fit import Rows, fit_batches
from pedyra.fitting.request import FitRequest
from pedyra.fitting.judge import Judge

torch.manual_seed(0)
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)),
                       LoraConfig(r=4, lora_alpha=20, target_modules=["0", "2"]))
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
allocator = RankAllocator(model, optimizer, PeDyra(interval=2, initial_warmup=2, final_warmup=4, moves=1), 24)
batches = [{"x": torch.randn(8, 8)} for _ in range(24)]

def loss(model, batch):
    return (model(batch["x"]) - batch["x"][:, :4].tanh()).square().mean()

for step in range(24):
    optimizer.zero_grad()
    loss(model, batches[step]).backward()
    allocator.before_step()
    optimizer.step()
    allocator.after_step()
allocator.release()
detach(model)
judge = Judge(model, loss)
found = fit_batches(judge, Rows(calibration=batches, heldout=batches), FitRequest(tolerance="50%"))
print(len(allocator.history), found.row()["of"])
"""


def test_the_core_runs_where_transformers_trainer_cannot_be_imported():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRAINER], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "8"], done.stdout
