# `make test` and `make demo` do all of their set-up; GPU targets use the Python you already have.
PYTHON ?= python3
PYTHON_FLOOR ?= python3.10
BIN := .venv/bin
SOURCES := optimx triton_kernels tests bench docs examples
FLOOR_TESTS := parity stock_defects contract checkpoints fallback layouts grad_scaler clip_grad schedules schedule_lr \
               named_schedulers build config errors

# threads that wait for each other must not burn the core the other one needs: matters where the machine is shared
test test-floor fake-gpu demo plots: export OMP_WAIT_POLICY = PASSIVE

.PHONY: help test test-floor fake-gpu audit host lint format bench report demo plots docs
.PHONY: gpu gpu-smoke gpu-test gpu-bench gpu-tune gpu-setup clean

help:
	@echo "make test        tests: native, then the Triton kernels interpreted on the CPU, then some on a fake GPU"
	@echo "make fake-gpu    tests of a GPU on a fake one, TESTS=... for any of them (needs g++)"
	@echo "make test-floor  some of the tests, with the oldest Python, torch and triton"
	@echo "make audit       compile every kernel for five GPU architectures, read assembly"
	@echo "make host        what the host pays for a step on a GPU, without a GPU: stub driver"
	@echo "make lint        ruff and mypy"
	@echo "make bench       benchmarks beside torch.optim and other packages; convergence"
	@echo "make report      a page and charts of all results, and the tables of README and docs"
	@echo "make demo        train a small GPT twice, with torch.optim and with optimx"
	@echo "make plots       draw the documentation's pictures: schedules, singular values, a watched run, bad batches"
	@echo "make docs        build the documentation in site/"
	@echo "make gpu-smoke   every optimizer once on a GPU, then kernels and test_gpu: 4 minutes"
	@echo "make gpu-test    all tests that need a GPU: 8 minutes"
	@echo "make gpu-bench   benchmarks on a GPU; PART=1, 2, 3 or questions: 9 minutes each"
	@echo "make gpu-tune    tile sizes on a GPU; KEEP=1 lets the launchers use what is found"
	@echo "make gpu         all four. GPU targets take python3 on PATH, results go to OUT"

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[triton,test,models,trainers,config,bench,search,docs,lint]"
	@touch $@

test: .venv/.installed
	$(BIN)/python -m pytest -n 2 --dist loadgroup --timeout 300 tests --ignore tests/audit
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --timeout 300 -m interpreted tests --ignore tests/audit
	$(BIN)/python -m tests.fake_gpu

# the tests of a GPU on one that is host memory: a thin selection, or TESTS="tests/test_parity.py -k adamw"
fake-gpu: .venv/.installed
	$(BIN)/python -m tests.fake_gpu $(TESTS)
	$(if $(TESTS),,$(BIN)/python -m pytest -n 2 --timeout 300 -p tests.fake_gpu.stub_plugin tests/fake_gpu/test_stub.py)

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

host: .venv/.installed
	$(BIN)/python -m bench host --stub

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
	OMP_WAIT_POLICY=PASSIVE .venv-bench/bin/python -m bench.convergence_muon
	OMP_WAIT_POLICY=PASSIVE .venv-bench/bin/python -m bench.convergence_storage
	OMP_WAIT_POLICY=PASSIVE .venv-bench/bin/python -m bench.lr_find
	OMP_WAIT_POLICY=PASSIVE .venv-bench/bin/python -m bench.bad_steps
	OMP_WAIT_POLICY=PASSIVE .venv-bench/bin/python -m bench.step_costs

report: .venv/.installed
	$(BIN)/python -m bench.report --readme README.md docs/benchmarks.md docs/bench.md docs/sharding.md docs/optimizers/muon.md docs/storage.md docs/lr_find.md docs/bad_steps.md docs/averages.md docs/watching.md docs/compiled_formulas.md

demo: .venv/.installed
	$(BIN)/python -m bench.demo

plots: .venv/.installed
	$(BIN)/python -m bench.plots

# the theme advertises another generator on every build
docs: export NO_MKDOCS_2_WARNING = true
docs: .venv/.installed
	$(BIN)/python -m mkdocs build --strict --quiet

# GPU targets need torch, triton and pytest, and no network; results of a part stay whatever becomes of the next one
gpu-%: export PYTHONUNBUFFERED = 1
RESULTS = $(or $(OUT),build/gpu)
# twelve processes where pytest-xdist is there, else one
PARALLEL = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo -n 12)
GPU_PYTEST = $(PYTHON) -m pytest -q -rfE --tb=short -m gpu $(if $(PARALLEL),-n 12)

gpu:
	@status=0; for part in gpu-smoke gpu-test gpu-bench gpu-tune; do $(MAKE) $$part || status=1; done; exit $$status

# a checkout that nobody installed finds its kernels through a link
gpu-setup:
	@$(PYTHON) -c "import optimx.triton_kernels" 2>/dev/null || ln -sfn ../triton_kernels optimx/triton_kernels
	@mkdir -p $(RESULTS)

gpu-smoke: gpu-setup
	@status=0; $(PYTHON) -m tests.gpu_smoke --out $(RESULTS) || status=1; \
	$(GPU_PYTEST) --junitxml=$(RESULTS)/smoke-tests.xml tests/test_kernels.py tests/test_storage_kernels.py tests/test_gpu.py || status=1; exit $$status

gpu-test: gpu-setup
	$(GPU_PYTEST) --junitxml=$(RESULTS)/tests.xml tests --ignore tests/audit

# a report also of what came through
gpu-bench: gpu-setup
	@status=0; $(PYTHON) -m bench --gpu $(if $(PART),--part "$(PART)") $(if $(OUT),--out $(OUT)) || status=1; \
	$(PYTHON) -m bench.report $(OUT) || status=1; exit $$status

gpu-tune: gpu-setup
	$(PYTHON) -m bench.tune --out $(RESULTS) $(if $(KEEP),--keep)

clean:
	rm -rf .venv .venv-bench .venv-floor build site dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis demo_out
