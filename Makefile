# `make pretrain` and `make test` do everything on a machine that has Python and a C++ compiler.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers, to which tests/conftest.py gives whole files. Tests of ranks wait for processes, so three
# keep two cores busy.
WORKERS = 3
PYTEST = $(BIN)/pytest -n $(WORKERS) --no-loadscope-reorder
STEPS := 300
SEEDS := 0
KEYS := 1
CLUSTER := iproute2 procps hostname openssh-server openssh-client pdsh munge slurmctld slurmd \
  slurm-client
# Without files of bytecode, every worker prepares the assertions of all tests anew.
unexport PYTHONDONTWRITEBYTECODE
# GOAL is the run's train.steps so far. MORE adds STEPS once the run has written its report.
GOAL = $(shell sed -n 's/^  steps: //p' runs/quickstart/config.yaml 2>/dev/null)
MORE = $(if $(GOAL),$(if $(wildcard runs/quickstart/report.json),$(STEPS),0))

# What `passkey` trains and asks for. The curriculum doubles the keys from two to twice as many as are
# asked for, MOST. A segment has room for four keys, stated and asked for.
PASSKEY = configs/passkey.yaml
PASSKEY_RUNS = runs/passkey
ifneq ($(KEYS),1)
MOST := $(shell echo $$((2 * $(KEYS))))
NUMBERS := $(shell k=2; while [ $$k -lt $(MOST) ]; do printf $$k,; k=$$((2 * k)); done)$(MOST)
LENGTHS := $(shell n=2; while [ $$((4 * n)) -lt $(MOST) ]; do n=$$((2 * n)); done; \
  while [ $$n -lt 16 ]; do printf $$n,; n=$$((2 * n)); done)16
PASSKEY = configs/passkey_keys.yaml data.store=stores/passkey_$(KEYS)_keys \
  data.passkey.keys=[$(NUMBERS)] train.curriculum.keys=[$(NUMBERS)] \
  data.passkey.segments=[$(LENGTHS)] train.curriculum.segments=[$(LENGTHS)]
PASSKEY_RUNS = runs/passkey_$(KEYS)_keys
PASSKEY_ASKED = --keys $(KEYS) --queries 1 --segments 4,16,64,256 --samples 256
endif

.PHONY: pretrain passkey babilong check test test-all test-long test-slow test-extras test-of-one-process \
  test-with-ranks test-cluster test-toolchains cluster-packages gpu-check gpu-bundle lint style \
  types types-but-exports format docs clean

# A real run: two processes, a two-stage pipeline. Run it again to train for STEPS more.
pretrain: $(VENV)/installed
	$(BIN)/infini-ds prepare configs/quickstart.yaml
	DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level error \
	  --num_accelerators 2 launch/pretrain.sh configs/quickstart.yaml \
	  train.steps=$$(( $(or $(GOAL),$(STEPS)) + $(or $(MORE),0) ))

# For each seed, trains a model to remember pass keys and asks for them up to 1,048,576 bytes later;
# with KEYS=4, it remembers four and is asked for one of them up to 32,768 bytes later.
passkey: $(VENV)/installed
	$(BIN)/infini-ds prepare $(PASSKEY)
	for seed in $(SEEDS); do \
	  DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level error \
	    --num_accelerators 2 launch/pretrain.sh $(PASSKEY) \
	    seed=$$seed output_dir=$(PASSKEY_RUNS)/seed_$$seed \
	  && $(BIN)/infini-ds passkey $(PASSKEY_RUNS)/seed_$$seed $(PASSKEY_ASKED) || exit 1; \
	done

# For each seed, trains a model to remember facts in real text and asks it up to 1,048,576 tokens
# later.
babilong: $(VENV)/installed
	$(BIN)/infini-ds prepare configs/babilong.yaml
	for seed in $(SEEDS); do \
	  DS_ACCELERATOR=cpu PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed --log_level error \
	    --num_accelerators 2 launch/pretrain.sh configs/babilong.yaml \
	    seed=$$seed output_dir=runs/babilong/seed_$$seed \
	  && $(BIN)/infini-ds babilong runs/babilong/seed_$$seed || exit 1; \
	done

# Types are checked while tests run. `check` leaves those of exports' own code to `test`, since
# pyright reads all of transformers for them.
check: style
	@$(MAKE) --no-print-directory -j2 types-but-exports test-of-one-process

test-of-one-process: WORKERS = 2
test-of-one-process: $(VENV)/installed
	$(PYTEST) -m "not (ranks or hosts or gpu or kernels or long or slow or extras)"

test: style
	@$(MAKE) --no-print-directory -j2 types test-with-ranks

test-with-ranks: $(VENV)/installed
	$(PYTEST) -m "not (hosts or long or slow or extras)"

# What takes many seconds in one process: commands from their start to their end, torch.compile.
test-long: $(VENV)/installed
	$(PYTEST) -m "long and not (hosts or slow)"

test-all: lint
	$(PYTEST) -m "not extras"

# What needs lm-evaluation-harness and a browser; this installs the first, and as root the second.
test-extras: $(VENV)/installed
	command -v chromium >/dev/null || test "$$(id -u)" != 0 || { apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[eval]'
	$(PYTEST) -m extras

test-slow: $(VENV)/installed
	$(BIN)/pytest -m slow

# Tests the Triton kernels with each supported pair of torch and Triton; downloads 7 GB.
test-toolchains: $(VENV)/installed
	$(BIN)/python .ci/toolchains.py

# Needs root: it simulates hosts and a Slurm cluster on this machine. MARKED="not slow" leaves out
# the dearest.
MARKED := hosts
test-cluster: $(VENV)/installed cluster-packages
	$(BIN)/pytest -m "$(MARKED)" tests/cluster

# Installs the packages of CLUSTER that are missing.
cluster-packages:
	@test "$$(id -u)" = 0 || { echo "make $@: needs root"; exit 2; }
	dpkg -s $(CLUSTER) >/dev/null 2>&1 || { apt-get update -qq \
	  && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(CLUSTER); }

# Checks everything for a first day on a GPU (launch/GPU.md). An empty VENV uses PYTHON directly;
# ONLY names the steps to run.
gpu-check: $(if $(VENV),$(VENV)/installed)
	PYTHON=$(if $(VENV),$(BIN)/python,$(PYTHON)) bash launch/gpu_check.sh $(ONLY)

# Fills .wheels with what a GPU machine without a package index lacks.
gpu-bundle:
	PYTHON=$(PYTHON) bash launch/gpu_bundle.sh

lint: style types

style: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed
	$(BIN)/pyright

types-but-exports: $(VENV)/installed
	$(BIN)/pyright $$(find infini_ds -name '*.py' -not -path '*/conversion/hf/*')

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the configuration reference into its page, and the schema beside the configs.
docs: $(VENV)/installed
	$(BIN)/infini-ds config > docs/configuration.reference
	sed -i -e '/^<!-- configuration reference -->/,/^<!-- end of/{//!d}' \
	  -e '/^<!-- configuration reference -->/r docs/configuration.reference' docs/configuration.md
	rm docs/configuration.reference
	$(BIN)/infini-ds config --schema > configs/schema.json

clean:
	rm -rf $(VENV) .venv-toolchains runs stores build *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch wheel
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,lint]'
	touch $@
