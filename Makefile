# `make demo`: the whole path on a real corpus.  `make test`: the CPU test suite.  Python 3.11+, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes share two cores: a second OpenMP thread in each would wait for the first.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow lint check format bench golden clean

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo $(if $(FRESH),--fresh)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kernels longhorn_layers pretrain data_tools launch

check: lint
	$(BIN)/python -m pytest tests/test_import_rules.py tests/kernels tests/longhorn_layers tests/pretrain/test_config.py tests/pretrain/test_optim.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)
	$(BIN)/python -m kernels.benchmarks
	$(BIN)/python -m pretrain.benchmark

golden: $(INSTALLED)
	$(BIN)/python -m pytest tests/integration/test_parity.py -k golden --record-golden

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@
