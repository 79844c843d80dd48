# make train    install into .venv and train configs/base.py      (CONFIG=configs/other.py  ARGS="--config.steps=100")
# make test     install the test tools too; lint, types, tests    (PYTEST_ARGS="-k model")
# make check    lint, types and the quick tests of the parts that change most
# make plan-env make .venv-plan, where `jaxlm plan` compiles for GPUs that are not there (7 GB)
# make test-gpu compile the step there with every reduction and configuration
# make lint     only ruff and pyright
# make lock     rebuild locks/*.txt from pyproject.toml           (LOCK_ARGS=--upgrade)
# make clean    remove .venv and caches; never runs/

CONFIG ?= configs/base.py
# The default run takes at most 5 minutes. A slow machine makes fewer steps; a CPU with AMX rounds matrix products.
# ARGS= makes all steps, in float32.
ARGS ?= $(if $(filter configs/base.py,$(CONFIG)),--max_minutes 5 --config.model.matmul_precision=fastest)
PYTEST_ARGS ?=
LOCK_ARGS ?=

# The first interpreter that runs and is Python 3.11 to 3.13. TensorFlow, which reads the data, has no newer wheels.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && echo $$p && break; done)

VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
RUN_LOCK := locks/$(if $(GPU),cuda12,run).txt
RUN_STAMP := $(VENV)/.$(if $(GPU),cuda12,run)
TEST_STAMP := $(VENV)/.test
PLAN_VENV := .venv-plan
PLAN_STAMP := $(PLAN_VENV)/.cuda12
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q

.PHONY: help train test check plan-env test-gpu lint lock clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

train: $(RUN_STAMP)
	@$(BIN)/python -m jaxlm.main --config $(CONFIG) $(ARGS)

test: lint
	@JAXLM_TEST_COMPILER=fast $(BIN)/python -m pytest $(PYTEST_ARGS)

check: lint
	@$(BIN)/python -m pytest -q -m "not slow and not peers" tests/test_rooms.py tests/config tests/model tests/sync \
		tests/train/test_guard.py tests/train/test_schedules.py

plan-env: $(PLAN_STAMP)

test-gpu: $(TEST_STAMP) $(PLAN_STAMP)
	@$(BIN)/python -m pytest -q -m gpu_compile --dist load tests/gpu

lint: $(TEST_STAMP)
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m pyright

lock:
	@tools/lock.sh $(LOCK_ARGS)

clean:
	rm -rf $(VENV) $(PLAN_VENV) .pytest_cache .ruff_cache .hypothesis dist
	find jaxlm configs tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp has the time of the last installation. A newer lock, pyproject.toml or interpreter installs again.
$(RUN_STAMP): $(RUN_LOCK) locks/build.txt pyproject.toml $(BIN)/python
	@echo "installing $(RUN_LOCK) into $(VENV): the first time takes a few minutes"
	@$(PIP) --require-hashes -r locks/build.txt
	@$(PIP) --no-build-isolation --require-hashes -r $(RUN_LOCK)
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(TEST_STAMP): locks/test.txt locks/build.txt pyproject.toml $(BIN)/python $(if $(GPU),$(RUN_STAMP))
	@echo "installing locks/test.txt into $(VENV): the first time takes a few minutes"
	@$(PIP) --require-hashes -r locks/build.txt
	@$(PIP) --no-build-isolation --require-hashes -r locks/test.txt
	@$(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(PLAN_STAMP): locks/cuda12.txt locks/build.txt pyproject.toml
	@echo "installing locks/cuda12.txt into $(PLAN_VENV): 7 GB, a few minutes"
	@test -x $(PLAN_VENV)/bin/python || $(PYTHON) -m venv $(PLAN_VENV)
	@$(PLAN_VENV)/bin/python -m pip --disable-pip-version-check install -q --require-hashes -r locks/build.txt
	@$(PLAN_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-build-isolation --require-hashes \
		-r locks/cuda12.txt
	@$(PLAN_VENV)/bin/python -m pip --disable-pip-version-check install -q --no-build-isolation --no-deps -e .
	@touch $@

# Refuse a PYTHON= that differs from the environment's, rather than replace the environment unasked.
ifeq ($(origin PYTHON),command line)
.PHONY: same_python
same_python:
	@test ! -x $(BIN)/python || test "$$($(BIN)/python -V)" = "$$($(PYTHON) -V)" || \
		{ echo "make: $(VENV) has $$($(BIN)/python -V) and PYTHON=$(PYTHON) is $$($(PYTHON) -V); make clean first, or leave PYTHON out" >&2; exit 2; }
$(RUN_STAMP) $(TEST_STAMP): | same_python
endif

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: jaxlm needs Python 3.11, 3.12 or 3.13, and none was found; name one with PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "make: jaxlm needs Python 3.11, 3.12 or 3.13; $(PYTHON) is %d.%d" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) lacks venv; install it (Debian and Ubuntu: apt install python3-venv), or name another with PYTHON=" >&2; exit 2; }
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }
