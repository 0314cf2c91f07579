# make demo, make test and make lab work on a fresh machine with nothing but make and Python 3.10 to 3.13.
# Each makes the virtual environment .venv the first time, installs what it needs there, and finds it in
# place the next time.
#
#   make PYTHON=/path/to/python3.12 demo     use this Python for the environment
#   make VENV=/path/to/env demo              keep the environment elsewhere
#   make ARGS="--max-tokens 32" demo         pass options on (demo, test)
#   make BOOK=zh lab                         open the Chinese workbook

VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
BOOK ?= $(if $(filter zh%,$(LANG)),zh,en)
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10)
IN_RANGE := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
CHROMIUMS := chromium chromium-browser google-chrome google-chrome-stable

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu lab notebooks check-notebooks lint chromium-note clean distclean

help:
	@echo "make demo       install nanoPD into $(VENV) and run the embedded model in all three modes"
	@echo "make lab        open the workbook in JupyterLab (BOOK=en or BOOK=zh)"
	@echo "make test       ruff, the notebook builder's check, and the test suite"
	@echo "make test-gpu   the GPU tests, the sanitizer and all chapters, on a machine with a CUDA device"
	@echo "make notebooks  write notebooks/en and notebooks/zh from notebooks/src"
	@echo "make lint       ruff alone"
	@echo "make clean      remove caches and build output;  make distclean removes $(VENV) too"

# ------------------------------------------------------------------------------------- the environment

$(VENV)/pyvenv.cfg:
	@set -e; chosen=; seen=; \
	for python in $(PYTHONS); do \
		found=$$($$python -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
		seen="$$seen $$python is $$found;"; \
		if $$python -c '$(IN_RANGE)'; then chosen=$$python; break; fi; \
	done; \
	if [ -z "$$chosen" ]; then \
		echo "nanoPD needs Python 3.10 to 3.13. Looked for: $(PYTHONS). Found:$${seen:- none of them.}" >&2; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12 $(or $(MAKECMDGOALS),demo)" >&2; \
		exit 1; \
	fi; \
	if ! $$chosen -c 'import ensurepip, venv' 2>/dev/null; then \
		echo "$$chosen ($$found) cannot make virtual environments: its venv module is not installed." >&2; \
		echo "On Debian or Ubuntu: apt-get install python3-venv. Or name another Python with PYTHON=..." >&2; \
		exit 1; \
	fi; \
	echo "==> Making $(VENV) with $$chosen ($$found)"; \
	$$chosen -m venv $(VENV)

# One stamp for each set of dependencies; a larger set covers the smaller ones.
$(VENV)/.ready-demo: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "==> Installing nanoPD and what the engine needs into $(VENV); torch is large, so the first time takes a while"
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(VENV)/.ready-lab: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "==> Installing nanoPD with JupyterLab into $(VENV); torch is large, so the first time takes a while"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[lab]"
	@touch $(VENV)/.ready-demo $@

$(VENV)/.ready-test: $(VENV)/pyvenv.cfg pyproject.toml
	@echo "==> Installing nanoPD with the test tools into $(VENV); torch is large, so the first time takes a while"
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[test]"
	@touch $(VENV)/.ready-demo $(VENV)/.ready-lab $@

# --------------------------------------------------------------------------------------------- the work

demo: $(VENV)/.ready-demo
	@$(BIN)/nanopd demo $(ARGS)

lab: $(VENV)/.ready-lab
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)/notebooks" \
		--LabApp.default_url="/lab/tree/$(BOOK)/$(notdir $(firstword $(sort $(wildcard notebooks/$(BOOK)/*.ipynb))))" \
		$$([ "$$(id -u)" = 0 ] && echo --allow-root)

notebooks: $(VENV)/.ready-lab
	$(BIN)/python -m nanopd.workbook.builder

check-notebooks: $(VENV)/.ready-test
	@echo "==> Notebooks: are they what the builder writes?"
	$(BIN)/python -m nanopd.workbook.builder --check

lint: $(VENV)/.ready-test
	@echo "==> ruff"
	$(BIN)/ruff check .

chromium-note:
	@for browser in $(CHROMIUMS); do command -v $$browser >/dev/null 2>&1 && exit 0; done; \
		echo "==> No Chromium on this machine: the browser tests will be skipped (Debian: apt-get install chromium fonts-noto-cjk)"

test: $(VENV)/.ready-test lint check-notebooks chromium-note
	@echo "==> pytest"
	@# one more than there are cores: browsers and processes are waited for much of the time
	@$(BIN)/python -m pytest --numprocesses $$($(BIN)/python -c "import os; print(os.cpu_count() + 1)") --dist loadfile --no-loadscope-reorder $(ARGS)

# Everything that a machine with a GPU can tell beyond `make test`: the engine's GPU tests, and every chapter on the GPU.
test-gpu: $(VENV)/.ready-test
	@$(BIN)/python -m pytest -m gpu tests/gpu $(ARGS)
	@$(BIN)/python tests/gpu/sanitize.py
	@$(BIN)/python -m pytest tests/workbook/test_notebooks.py $(ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then echo "rm -rf $(VENV)"; rm -rf "$(VENV)"; fi
