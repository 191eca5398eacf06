# Each target works from a fresh clone: it makes .venv, installs what it needs and does its job. A second call reuses it.
# `reproduce` alone takes data and weights as well, see docs/results.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := demo,test
FORK_VENV := .venv-fork
FORK_EXTRAS := mmpretrain-fork,robustbench,data,test

.PHONY: demo smoke test test-slow test-fork test-matrix gpu lint type bench reproduce campaign clean help

help:
	@echo "make demo       small students and robust networks on real digits; tables and plots in runs/demo"
	@echo "make smoke      the wheel, the sdist and an editable install, from an empty directory: every command of ikl"
	@echo "make test       tests, doctests, coverage"
	@echo "make test-slow  the tests that take minutes"
	@echo "make test-matrix  the core and both adapters with other releases of torch and Python; docs/compatibility.md"
	@echo "make test-fork  the MMPretrain tests, in a second environment with the maintained forks (onedl-*)"
	@echo "make gpu        tests and measurements on a CUDA device, nine minutes; tables in runs/gpu"
	@echo "make lint       ruff"
	@echo "make type       mypy"
	@echo "make bench      time and memory of the losses and of training steps; tables and CSV in runs/bench"
	@echo "make reproduce  the paper's tables in miniature on CIFAR-10, some hours; tables and plots in docs/results"
	@echo "make campaign   kill -9, generated inputs, mutated configs, hostile checkpoints, full disks; in runs/reliability"

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tools/demo.py

smoke: $(VENV)/installed
	$(BIN)/python -m pytest -m installed tests/installed

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not campaign and not installed and not gpu" \
	    --cov --cov-report=term --cov-fail-under=95

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

$(FORK_VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FORK_VENV)
	$(FORK_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$(FORK_EXTRAS)]'
	touch $@

test-fork: $(FORK_VENV)/installed
	$(FORK_VENV)/bin/python -m pytest tests/mmpretrain

test-matrix: $(VENV)/installed
	$(BIN)/python tools/matrix.py

gpu: $(VENV)/installed
	PYTHON=$(BIN)/python tools/evidence/gpu.sh

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: $(VENV)/installed
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/python tools/bench.py

reproduce: $(VENV)/installed
	$(BIN)/python tools/reproduce.py distill
	$(BIN)/python tools/reproduce.py adversarial

campaign: $(VENV)/installed
	$(BIN)/python -m pytest tests/campaign -m campaign --campaign-record runs/reliability

clean:
	rm -rf $(VENV) $(FORK_VENV) .venv-matrix runs .pytest_cache .mypy_cache .ruff_cache .coverage*
