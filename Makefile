# `make demo`: the whole path on a real corpus.  `make test`: the CPU test suite.  Python 3.11+, git and make are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two processes share two cores: a second OpenMP thread in each would wait for the first.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

# On a GPU machine with its own torch: `make gpu-test bench BIN=/usr/bin INSTALLED=` leaves the venv out.
GPU := $(wildcard /dev/nvidia0)

.PHONY: demo test test-slow fault-test slurm-test gpu-test lint check format bench golden clean

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo $(if $(FRESH),--fresh)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m "slow and not fault and not slurm"

# Kills, hangs, damaged files, full disks, NaNs, signals, and every topology resuming every other: tables at the end.
fault-test: $(INSTALLED)
	$(BIN)/python -m pytest tests/faults --fault-report=fault-report.md

# Jobs on a real Slurm of network namespaces. Root on Debian gets what is missing; others are told why nothing ran.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge iproute2

slurm-test: $(INSTALLED)
	which slurmctld slurmd sbatch munged ip >/dev/null || test "$$(id -u)" != 0 || \
		{ apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends $(SLURM_PACKAGES); }
	$(BIN)/python -m pytest -rs -m slurm tests/slurm

# What the interpreter stands in for elsewhere; needs no deepspeed and no megatron-core.
gpu-test: $(INSTALLED)
	$(BIN)/python3 -m kernels.selftest --device cuda --fresh
	$(BIN)/python3 -m pytest --confcutdir=tests/kernels tests/kernels/gpu tests/kernels/test_attention.py tests/kernels/test_gla.py tests/longhorn_layers/test_model_on_gpu.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy kernels longhorn_layers pretrain data_tools launch

check: lint
	$(BIN)/python -m pytest tests/test_import_rules.py tests/kernels tests/longhorn_layers tests/pretrain/test_config.py tests/pretrain/test_optim.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ifeq ($(GPU),)
bench: $(INSTALLED)
	$(BIN)/python -m kernels.benchmarks
	$(BIN)/python -m pretrain.benchmarks.llama
else
bench: export PYTORCH_CUDA_ALLOC_CONF ?= expandable_segments:True
bench: $(INSTALLED)
	$(BIN)/python3 -m kernels.benchmarks --device cuda --repeats 20
	$(BIN)/python3 -m pretrain.benchmarks.step launch/configs/1p3b.yaml
	$(BIN)/python3 -m pretrain.benchmarks.decode launch/configs/1p3b.yaml
endif

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
