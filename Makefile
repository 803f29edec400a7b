# `make help` lists the targets. Needs Python 3.11–3.13; everything else is installed into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable
DEMO_MODEL := all-minilm-l6-v2
# Ends what does not end by itself, after a report of what was done until then.
LIMIT := $(if $(shell command -v timeout),timeout --signal=INT --kill-after=60 80m)
PEERS := $(patsubst tests/peers/%.txt,%,$(wildcard tests/peers/*.txt))

.DEFAULT_GOAL := help
.PHONY: help demo up test check test-exports bench-search bench-optimizers bench-digits bench-budgets bench-hessian bench-kernels bench-kl bench-minilm bench-pqi bench-proxies bench-modelopt bench-service clean

help: ## Say what each target does
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Install, search a real model under a budget, and write demo-output/
	$(BIN)/bitfrontier models add $(DEMO_MODEL) "$$($(BIN)/python scripts/demo_model.py)"
	$(BIN)/bitfrontier search $(DEMO_MODEL) --target vllm --budget avg_bits=5.25 --local --output demo-output

up: $(VENV)/.demo ## Start the database, the API and a worker, and keep them running
	$(BIN)/bitfrontier up

# One thread each: those that wait for one another on busy cores make small work a hundred times slower. One process more
# than there are cores, up to four: many tests wait for other processes.
# No test takes longer than its time limit (tests/running.py), nor all of them much longer than 65 minutes.
test: check ## Everything `check` does, then the tests
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(LIMIT) $(BIN)/python -m pytest --numprocesses $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --maxprocesses 4 \
		--dist loadfile --session-timeout 3900 --durations 25 \
		|| { code=$$?; [ $$code != 124 ] || echo "The tests were ended after 80 minutes; a test hangs." >&2; exit $$code; }

check: $(VENV)/.dev ## Lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test-exports: $(VENV)/.dev $(PEERS:%=.venv-peer-%/.done) ## Show every export to the tool it is for, and write benchmarks/results/<date>-exports.md (installs 12 GB, takes 5 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.exports_log

bench-search: bench-optimizers bench-digits bench-budgets ## The three benchmarks of the search (takes most of a day)

bench-optimizers: $(VENV)/.dev ## Compare the integer program with CBC, HiGHS and CP-SAT (takes 15 minutes)
	$(BIN)/python -m benchmarks.optimizers

bench-digits: $(VENV)/.dev ## Evaluations to find the frontier of an enumerated space (takes 5 minutes)
	$(BIN)/python -m benchmarks.digits

bench-budgets: $(VENV)/.dev .venv-modelopt/.done .venv-autoround/.done ## Held-out loss at every budget against ModelOpt and AutoRound (fetches 93 MB, takes most of a day)
	$(BIN)/python scripts/fetch_models.py
	$(BIN)/python -m benchmarks.budgets

bench-kl: $(VENV)/.dev ## Time measured divergences with and without reuse (fetches 93 MB, takes 5 minutes)
	$(BIN)/python scripts/fetch_models.py
	$(BIN)/python -m benchmarks.kl

bench-kernels: $(VENV)/.dev ## Check and time the GPU kernels; needs a CUDA device and CuPy (takes 10 minutes)
	$(BIN)/python -m benchmarks.kernels

bench-hessian: $(VENV)/.dev ## Time the probes of the Hessian trace (fetches 93 MB, takes 3 minutes)
	$(BIN)/python scripts/fetch_models.py
	$(BIN)/python -m benchmarks.hessian

bench-minilm: $(VENV)/.dev ## Time a full search on MiniLM (takes 3 minutes)
	$(BIN)/python -m benchmarks.minilm

bench-pqi: $(VENV)/.dev ## Completeness and error of post-quantization integrals (fetches 93 MB, takes 12 minutes)
	$(BIN)/python scripts/fetch_models.py
	MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 $(BIN)/python -m benchmarks.pqi

# Else the C library gives every large array back to the kernel, and half the time goes into page faults.
bench-proxies: $(VENV)/.dev ## How well metrics rank configurations of equal size (fetches 93 MB, first takes an hour)
	$(BIN)/python scripts/fetch_models.py
	MALLOC_MMAP_THRESHOLD_=8000000000 MALLOC_TRIM_THRESHOLD_=16000000000 $(BIN)/python -m benchmarks.proxies

bench-modelopt: $(VENV)/.dev .venv-modelopt/.done ## Time a sensitivity table here and by ModelOpt (takes 10 minutes)
	$(BIN)/python scripts/fetch_models.py
	$(BIN)/python -m benchmarks.modelopt --python .venv-modelopt/bin/python

bench-service: $(VENV)/.dev ## 200 clients for 30 s, and the overhead of a search (takes 3 minutes)
	$(BIN)/python -m benchmarks.load

clean: ## Remove what the targets above made, but no service's data
	rm -rf $(VENV) .venv-modelopt .venv-autoround .venv-peer-* benchmarks/.cache demo-output .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# ModelOpt and AutoRound have environments of their own: what they need must not decide what is used here.
.venv-modelopt/.done: constraints.txt
	$(PYTHON) -m venv .venv-modelopt
	.venv-modelopt/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
		nvidia-modelopt==0.47.0 torch transformers gguf accelerate efficientnet-lite-pytorch
	@touch $@

.venv-autoround/.done: constraints.txt
	$(PYTHON) -m venv .venv-autoround
	.venv-autoround/bin/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt \
		auto-round==0.16.1 torch transformers gguf accelerate
	@touch $@

# The tools that load our exports likewise; tests/peers/conftest.py says what their files hold.
.venv-peer-%/.done: tests/peers/%.txt constraints.txt
	$(PYTHON) -m venv .venv-peer-$*
	.venv-peer-$*/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	@[ ! -f tests/peers/$*.no-deps ] || .venv-peer-$*/bin/python -m pip install --disable-pip-version-check --quiet \
		--no-deps --requirement tests/peers/$*.no-deps
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed; name one with: make PYTHON=/path/to/python" >&2; exit 1; }
	@# Debian keeps ensurepip in a package of its own (python3-venv); pip can install itself without.
	$(PYTHON) -m venv $(VENV) 2>/dev/null \
		|| { $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install --quiet pip; }

# The stamps are newer than what they were made from as long as nothing has to be installed.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	$(INSTALL) ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time takes some minutes"
	$(INSTALL) ".[demo,dev]"
	@touch $@ $(VENV)/.demo
