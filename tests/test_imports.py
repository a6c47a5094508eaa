"""Imports go one way: config -> lora -> allocate -> methods -> runs -> compare; heavy ones are made late."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from arithmetic import ARITHMETIC

import pedyra

SOURCE = Path(pedyra.__file__).parent

LEAVES = {"files", "yaml_file", "hub", "packaged", "interrupts", "spelling", "options"}
"""Small modules that know nothing of pedyra but each other; every part may use them."""

# What the modules of each part may import of pedyra, itself and the leaves aside. The entry points (cli, console) stand
# above all of these and are not listed, so none of these can import them.
BELOW: dict[str, set[str]] = {
    **{leaf: set() for leaf in sorted(LEAVES)},
    "config": set(),
    "recipe_sections": {"lora"},
    "generate_section": {"recipe_sections"},
    "recipe": {"config", "recipe_sections", "generate_section"},
    "lora": {"config"},
    "fit": {"lora"},
    "allocate": {"config", "lora"},
    "methods": {"config", "lora", "fit", "allocate"},
    "tasks": {"config", "recipe_sections", "generate_section"},
    "models": {"config", "lora", "recipe_sections", "tasks"},
    "runs": {"config", "lora", "fit", "allocate", "methods", "recipe", "recipe_sections", "tasks", "models"},
    "compare": {"config", "lora", "methods", "recipe", "recipe_sections", "tasks", "models", "runs", "console"},
    "paper": {"recipe", "tasks", "models", "runs", "compare", "report", "console"},
    "bench": {
        *("config", "lora", "fit", "allocate", "methods", "recipe", "tasks", "models", "runs", "compare", "report"),
        "console",
    },
    "report": set(),
}
# Roots that a part must not import, not even inside a function.
FOREIGN = {
    "config": {"torch", "transformers", "peft", "numpy"},
    "report": {"torch", "transformers", "peft", "accelerate", "datasets", "safetensors"},
    "recipe_sections": {"torch", "transformers", "peft", "accelerate", "datasets"},
    "recipe": {"torch", "transformers", "peft", "accelerate", "datasets"},
    "tasks": {"peft"},
}


def imported(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions; not what is for type checkers only."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
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


def part_of(path: Path) -> str:
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def files(part: str) -> list[Path]:
    return [path for path in sorted(SOURCE.rglob("*.py")) if part_of(path) == part]


@pytest.mark.parametrize("part", BELOW)
def test_a_part_imports_only_what_lies_below_it(part):
    assert files(part), f"no such part: {part}"
    for path in files(part):
        allowed = BELOW[part] | LEAVES | {part}
        for name in imported(path):
            root, *rest = name.split(".")
            if root == "pedyra" and rest:
                assert rest[0] in allowed, f"{path.relative_to(SOURCE)} imports {name}"


def test_no_module_imports_itself_by_way_of_others():
    paths = {".".join(path.relative_to(SOURCE.parent).with_suffix("").parts): path for path in SOURCE.rglob("*.py")}
    paths = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    below = {name: (imported(path) & paths.keys()) - {"pedyra"} for name, path in paths.items()}
    # Whoever imports nothing that is left is in no circle, and neither is whoever nothing that is left imports.
    while free := {n for n, to in below.items() if not to & below.keys() or n not in set().union(*below.values())}:
        below = {name: to for name, to in below.items() if name not in free}
    assert not below, {name: sorted(to & below.keys()) for name, to in below.items()}


@pytest.mark.parametrize("part", FOREIGN)
def test_a_part_does_not_know_what_is_none_of_its_business(part):
    for path in files(part):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & FOREIGN[part], f"{path.relative_to(SOURCE)} imports {roots & FOREIGN[part]}"


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
        ("import pedyra.config", ("torch", "transformers", "peft", "numpy")),
        ("from pedyra import RankConfig; RankConfig()", ("torch", "transformers", "peft")),
        ("import pedyra.recipe", ("torch", "transformers", "peft", "datasets")),
        ("import pedyra.cli", ("torch", "transformers", "peft", "datasets", "vl_convert")),
        ("import pedyra.report", ("torch", "transformers", "peft")),
        ("import pedyra.methods.paper, pedyra.allocate.allocation", ("transformers", "peft")),
    ],
)
def test_a_fresh_interpreter_loads_nothing_heavy(statement, absent):
    check = f"import sys; {statement}; loaded = [m for m in {absent!r} if m in sys.modules]; assert not loaded, loaded"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_every_public_name_resolves():
    for name in pedyra.__all__:
        assert getattr(pedyra, name).__name__ == name
    assert set(pedyra.__all__) <= set(dir(pedyra))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pedyra.nonsense  # type: ignore[attr-defined]
