# Everything runs in .venv, which `make setup` creates with the first Python 3.11 or newer; PYTHON=... overrides it.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready

.PHONY: help setup demo test test-full test-gpu lint docs bench clean

help:
	@echo "make setup      create .venv and install autofunc with its tested versions"
	@echo "make demo       train GPT-2 on two processes (about three minutes)"
	@echo "make test       test every law at its most telling sizes (nine minutes)"
	@echo "make test-full  run the remaining tests: other sizes and combinations"
	@echo "make test-gpu   test laws on one GPU, all ranks in one process (two minutes)"
	@echo "make lint       check formatting, lints, types and import directions"
	@echo "make docs       build the documentation site into build/site"
	@echo "make bench      run the benchmarks (about an hour)"
	@echo "make clean      delete .venv and caches; runs stay"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || \
		{ echo "error: no Python 3.11 or newer found; name one: make setup PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/autofunc finetune llm -c examples/demo.yaml

# The tests of a file stay in one process, because they share fixtures. Tests start many processes, so bytecode is cached even
# if the environment disables it.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(READY)
	$(PYTEST)

test-full: $(READY)
	$(PYTEST) -m full --hypothesis-profile full

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu tests/gpu

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The site can be opened from disk: build/site/index.html.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

bench: $(READY)
	$(BIN)/python bench/step_time.py
	$(BIN)/python bench/engine_pieces.py
	$(BIN)/python bench/second_pipeline.py
	$(BIN)/python bench/engine_memory.py
	$(BIN)/python bench/python_overhead.py
	$(BIN)/python bench/against_torch.py --setting small
	$(BIN)/python bench/against_torch.py --setting large --repetitions 5
	$(BIN)/python bench/bubble.py
	$(BIN)/python bench/transfers.py
	$(BIN)/python bench/heap.py
	$(BIN)/python bench/prediction.py
	$(BIN)/python bench/tensor_parallel.py
	$(BIN)/python bench/captured_tensor_parallel.py
	$(BIN)/python bench/context_parallel.py
	$(BIN)/python bench/matmul_kernels.py
	$(BIN)/python bench/schedule_scale.py
	$(BIN)/python bench/schedule_search.py

clean:
	rm -rf .venv .inductor_cache .hypothesis
