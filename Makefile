# `make help` lists the targets. Each makes the environment that it needs and brings it up to date.

PYTHON ?= python3
WORKERS ?= 3
TRANSFORMERS ?= 5.17.0

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
OLDEST := .venv-transformers-$(TRANSFORMERS)
NEWEST := .venv-transformers-main
APP := .venv-gradio
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-hf test-app test-oldest test-main docs build lint types clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON (python3), WORKERS (3, for test), TRANSFORMERS (5.17.0, for test-oldest), VENV (.venv)"

# pip compiles no modules, as few are ever imported. Python compiles those that are, and must be free to keep the result.
unexport PYTHONDONTWRITEBYTECODE

# Debian's python3 has no ensurepip: there the pip that is outside installs the one inside.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@echo "Installing into $(VENV) with $$($(PYTHON) --version); minutes the first time"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(VENV)/bin/python install -qq pip; }
	@$(VENV)/bin/python -m pip install -qq --no-compile -e '.[$(EXTRAS)]' -c $(CONSTRAINTS)
	@touch $@

demo: $(INSTALLED) ## a DinoSR learns the units of synthetic speech, then to recognise it: tables, a picture, a transcript
	@$(VENV)/bin/python examples/demo.py
	@$(VENV)/bin/python examples/demo_recognition.py

HF_SUITE = tests/hf_common/run.sh $(VENV)/bin/python

# Once, or all processes of the tests would compile the same modules at the same time.
$(VENV)/.compiled: $(INSTALLED)
	@$(VENV)/bin/python -c "import datasets, matplotlib.pyplot, onnxruntime, pandas, peft, scipy.stats, sklearn.cluster; \
		from dinosr_hf import analysis, finetuning, hub, inference, pretraining, recognition, units"
	@touch $@

# Side by side, and in more processes than two cores, because tests wait for processes and signals. Their files are in
# memory where there are 4 GB of it for files, as checkpoints wait for a disk many times.
test: $(VENV)/.compiled ## the tests, and transformers' own
	@[ "$$(df --output=avail /dev/shm 2>/dev/null | tail -n 1)" -gt 4000000 ] 2>/dev/null && in=/dev/shm || in=$${TMPDIR:-/tmp}; \
	export TMPDIR=$$(mktemp -d "$$in/dinosr-tests-XXXXXX"); \
	log=$$TMPDIR/hf.log; HF_COMMON_WORKERS=0 $(HF_SUITE) >$$log 2>&1 & other=$$!; \
	trap 'kill $$other 2>/dev/null; rm -rf "$$TMPDIR"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; failed=0; \
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n $(WORKERS) --dist worksteal || failed=1; \
	wait $$other || failed=1; cat $$log; exit $$failed

test-hf: $(INSTALLED) ## transformers' own common tests on our classes
	@$(HF_SUITE)

# gradio holds back Pillow.
$(APP)/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	@grep -v '^pillow==' $< >$@

test-app: $(APP)/constraints.txt ## the tests of the page of examples/app.py, with gradio, in an environment of its own
	@$(MAKE) --no-print-directory $(APP)/.installed VENV=$(APP) CONSTRAINTS=$< EXTRAS=dev,app
	@$(APP)/bin/python -m pytest -q tests/hub/test_space.py

# The pin gives way; what the older release needs beside it, pip finds.
$(OLDEST)/constraints.txt: constraints.txt
	@mkdir -p $(@D)
	@grep -vE '^(transformers|huggingface_hub|tokenizers)==' $< >$@
	@echo "transformers==$(TRANSFORMERS)" >>$@

test-oldest: $(OLDEST)/constraints.txt ## `make test` under the oldest transformers, in an environment of its own
	@$(MAKE) --no-print-directory test VENV=$(OLDEST) CONSTRAINTS=$<

test-main: ## `make test` under transformers' main branch, in an environment of its own
	@mkdir -p $(NEWEST)
	@curl -fsSL https://github.com/huggingface/transformers/archive/main.tar.gz -o $(NEWEST)/main.tar.gz
	@grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt >$(NEWEST)/constraints.txt
	@echo "transformers @ file://$(CURDIR)/$(NEWEST)/main.tar.gz" >>$(NEWEST)/constraints.txt
	@HF_COMMON_SDIST=$(CURDIR)/$(NEWEST)/main.tar.gz \
		$(MAKE) --no-print-directory test VENV=$(NEWEST) CONSTRAINTS=$(NEWEST)/constraints.txt

docs: $(INSTALLED) ## the documentation as a site, in build/site
	$(VENV)/bin/python -m sphinx -q -W --keep-going -c docs -d build/doctrees . build/site

build: $(INSTALLED) ## wheel and sdist, in dist
	@$(VENV)/bin/python -m build

lint: $(INSTALLED) ## ruff: rules and format; transformers' linter of model files
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mlinter --no-progress --no-cache src/dinosr_hf/model docs/upstream

types: $(INSTALLED) ## mypy
	$(VENV)/bin/mypy

clean: ## remove the environments and caches
	rm -rf .venv .venv-* .cache .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
