# `make test` and `make demo` do all of their set-up; GPU targets use the Python you already have.
PYTHON ?= python3
PYTHON_FLOOR ?= python3.10
BIN := .venv/bin
SOURCES := optimx triton_kernels tests bench docs
FLOOR_TESTS := parity stock_defects contract checkpoints fallback layouts grad_scaler clip_grad schedules schedule_lr \
               named_schedulers build config errors

# threads that wait for each other must not burn the core the other one needs: matters where the machine is shared
test test-floor fake-gpu demo: export OMP_WAIT_POLICY = PASSIVE

.PHONY: help test test-floor fake-gpu audit lint format bench report demo plots docs gpu gpu-test gpu-bench clean

help:
	@echo "make test        tests: native, then the Triton kernels interpreted on the CPU, then some on a fake GPU"
	@echo "make fake-gpu    tests of a GPU on a fake one, TESTS=... for any of them (needs g++)"
	@echo "make test-floor  some of the tests, with the oldest Python, torch and triton"
	@echo "make audit       compile every kernel for five GPU architectures, read assembly"
	@echo "make lint        ruff and mypy"
	@echo "make bench       benchmarks beside torch.optim and other packages; convergence"
	@echo "make report      a page and charts of all results, and the README's tables"
	@echo "make demo        train a small GPT twice, with torch.optim and with optimx"
	@echo "make plots       draw the README's picture of all schedules"
	@echo "make docs        build the documentation in site/"
	@echo "make gpu         gpu-test, then gpu-bench: with python3 on PATH, results in OUT"

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[triton,test,models,trainers,config,bench,docs,lint]"
	@touch $@

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --timeout 300 tests --ignore tests/audit
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --timeout 300 -m interpreted tests --ignore tests/audit
	$(BIN)/python -m tests.fake_gpu

# the tests of a GPU on one that is host memory: a thin selection, or TESTS="tests/test_parity.py -k adamw"
fake-gpu: .venv/.installed
	$(BIN)/python -m tests.fake_gpu $(TESTS)

# python, torch and triton of pyproject.toml's lower bounds. pyenv hides versions that nobody asked for
.venv-floor/.installed: export PYENV_VERSION = 3.10
.venv-floor/.installed: pyproject.toml constraints.txt
	@$(PYTHON_FLOOR) --version || { echo "test-floor: Python 3.10 should be on PATH, or PYTHON_FLOOR name it"; exit 1; }
	$(PYTHON_FLOOR) -m venv .venv-floor
	grep -vE '^(torch|triton)==' constraints.txt > .venv-floor/constraints.txt
	sed -nE 's/.*"(torch|triton)>=([0-9.]+).*/\1==\2/p' pyproject.toml >> .venv-floor/constraints.txt
	@grep -E '^(torch|triton)==' .venv-floor/constraints.txt
	.venv-floor/bin/python -m pip install --quiet --constraint .venv-floor/constraints.txt --editable ".[triton,test,config]" matplotlib
	@touch $@

test-floor: .venv-floor/.installed
	.venv-floor/bin/python -m pytest -n 2 --timeout 300 $(FLOOR_TESTS:%=tests/test_%.py)
	TRITON_INTERPRET=1 .venv-floor/bin/python -m pytest -n 2 --timeout 300 -m interpreted -k "adamw or sgd or lamb" tests/test_kernels.py

audit: .venv/.installed
	$(BIN)/python -m pytest -n 2 --timeout 600 tests/audit

lint: .venv/.installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# other optimizers change what trainers do where they find them, so they have a place of their own
.venv-bench/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[triton,test,bench,peers]"
	@touch $@

bench: .venv-bench/.installed
	.venv-bench/bin/python -m bench
	.venv-bench/bin/python -m bench.convergence

report: .venv/.installed
	$(BIN)/python -m bench.report --readme README.md

demo: .venv/.installed
	$(BIN)/python -m bench.demo

plots: .venv/.installed
	$(BIN)/python -m bench.plots

# the theme advertises another generator on every build
docs: export NO_MKDOCS_2_WARNING = true
docs: .venv/.installed
	$(BIN)/python -m mkdocs build --strict --quiet

# no numbers of what is wrong
gpu: gpu-test
	@$(MAKE) gpu-bench

gpu-test:
	$(PYTHON) -m pytest -q -m gpu tests --ignore tests/audit

gpu-bench:
	$(PYTHON) -m bench --gpu $(if $(OUT),--out $(OUT)); status=$$?; $(PYTHON) -m bench.report $(OUT) && exit $$status

clean:
	rm -rf .venv .venv-bench .venv-floor build site dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis demo_out
