# One recipe in, one trustworthy model out:  make recipe=recipes/quickstart.yaml
.DEFAULT_GOAL := $(if $(recipe),run,help)
.PHONY: help run install test test-all test-gpu test-stress test-recipes test-clients bench check format docs clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN_READY := $(VENV)/.run-ready
DEV_READY := $(VENV)/.dev-ready
CLIENTS := .clients
# node-llama-cpp with llama.cpp in it, built for this machine.
LLAMA_CPP := 3.22.1
LLAMA_CPP_BUILD := $(if $(filter Darwin,$(shell uname)),mac-arm64-metal,linux-x64)
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
MAKE_VENV := uv venv --quiet --seed --allow-existing --python $(PYTHON) $(VENV)
INSTALL := uv pip install --quiet --python $(BIN)/python
else
MAKE_VENV := $(PYTHON) -m venv $(VENV)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
endif

help:  ## Print this list.
	@echo "make recipe=FILE   check, train, export and evaluate a recipe, then write its report"
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */make \1|/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

run: $(RUN_READY)  ## Run the recipe given as recipe=FILE (options for mlx-ft as options="...").
	@test -n "$(recipe)" || { echo "say which: make recipe=recipes/quickstart.yaml" >&2; exit 2; }
	@$(BIN)/mlx-ft run $(recipe) $(options)

install: $(RUN_READY)  ## Make .venv and install mlx-ft into it.

$(RUN_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: use make PYTHON=python3.12 ..." >&2; exit 2; }
	@echo "installing mlx-ft into $(VENV) (once; about a minute)" >&2
	@$(MAKE_VENV)
	@$(INSTALL) -e .
	@touch $@

$(DEV_READY): $(RUN_READY)
	@echo "installing the development tools into $(VENV) (once)" >&2
	@$(INSTALL) -e '.[dev]'
	@touch $@

test: $(DEV_READY)  ## Run the tests (4 minutes, two processes; fetches the built-in model once).
	@$(BIN)/python -m pytest -n 2

test-all: $(DEV_READY)  ## Run these and the slower ones, and every shipped recipe in miniature.
	@$(BIN)/python -m pytest -n 2 -m "not stress and not clients and not gpu"

test-gpu: $(DEV_READY)  ## Run what must hold on a real GPU (Metal or CUDA); without one, say so.
	@$(BIN)/python -m pytest -m gpu -rs tests/gpu

test-stress: $(DEV_READY)  ## Run the stress tests (20 minutes: 200 kills of one training).
	@$(BIN)/python -m pytest -m stress

test-recipes: $(DEV_READY)  ## Rehearse every shipped recipe with a random miniature of its kind of model.
	@$(BIN)/python -m pytest -n 2 -m recipes

test-clients: $(DEV_READY) $(CLIENTS)/.ready  ## Load exported models in llama.cpp, mlx-lm's commands and the openai client (needs node and npm).
	@$(BIN)/python -m pytest -m clients -rP tests/clients

$(CLIENTS)/.ready: Makefile
	@command -v npm >/dev/null || { echo "cannot test with llama.cpp: npm is not installed" >&2; exit 2; }
	@echo "installing node-llama-cpp $(LLAMA_CPP) into $(CLIENTS) (once)" >&2
	@mkdir -p $(CLIENTS)
	@NODE_LLAMA_CPP_SKIP_DOWNLOAD=true npm install --silent --no-audit --no-fund --no-save \
	  --omit=optional --prefix $(CLIENTS) node-llama-cpp@$(LLAMA_CPP) \
	  @node-llama-cpp/$(LLAMA_CPP_BUILD)@$(LLAMA_CPP) \
	  || { echo "cannot test with llama.cpp: npm could not install node-llama-cpp $(LLAMA_CPP)" >&2; exit 2; }
	@touch $@

bench: $(DEV_READY)  ## Time one training by mlx_lm.lora and by mlx-ft, in turn (an hour; alone on the machine; options="...").
	@$(BIN)/python -m tests.benchmarks.training $(options)

check: $(DEV_READY)  ## Lint, formatting, types, architecture, generated documentation.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy docs/generate.py
	$(BIN)/python -m pytest tests/test_architecture.py
	$(BIN)/python docs/generate.py docs/reference.md --check

format: $(DEV_READY)  ## Format the code and apply safe fixes.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DEV_READY)  ## Write the generated parts of the reference.
	$(BIN)/python docs/generate.py docs/reference.md

clean:  ## Remove .venv and caches; runs/ stays.
	rm -rf $(VENV) $(CLIENTS) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
