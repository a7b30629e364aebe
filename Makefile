# Every target that runs Python first brings .venv up to date with requirements.txt (`make setup`);
# `make TARGET PY=python3` uses that interpreter as it is and installs nothing.
# Plain sh and GNU make 3.81 or newer, so that macOS's own make will do.

PYTHON ?= python3
# A PYTHON that you name is the only one tried.
CANDIDATES := $(PYTHON)$(if $(filter file,$(origin PYTHON)), python3.13 python3.12 python3.11)
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
NOTEBOOKS := 01_data 02_training 03_proxy_loop 04_analysis
VENV := .venv

# The notebooks' kernel is the interpreter that starts them, not a user-wide kernel of the same name.
export JUPYTER_PREFER_ENV_PATH := 1

ifdef PY
RUN = PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY)
NEEDS := torch torchvision timm captum papermill matplotlib pandas sklearn yaml filelock
MISSING := import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])
else
RUN = PYTHONPATH="$(CURDIR)" $(VENV)/bin/python
endif
INSTALL = PYTHONPATH= $(VENV)/bin/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help setup figures test lab bench study clean

help:
	@echo "make figures   run the four notebooks on the embedded data; figures go into figures/quick/"
	@echo "make test      pytest over tests/, and nbval over the notebooks"
	@echo "make lab       JupyterLab, opened in notebooks/ (options: make lab ARGS='--no-browser --port 9999')"
	@echo "make bench     the benchmarks, or one of them: make bench BENCH=heatmaps"
	@echo "make study     the runs of a study and its figures in figures/: make study STUDY=a (ARGS=--estimate: how long it takes)"
	@echo "make setup     .venv from the pinned requirements.txt; every target above does this first"
	@echo "make clean     remove caches and figures/quick/; runs/, data/ and .venv/ stay"
	@echo
	@echo "PYTHON=python3.12   makes .venv with this interpreter (Python 3.11 to 3.13)"
	@echo "PY=python3          uses this interpreter and its packages, and installs nothing"

ifdef PY
setup:
	@missing=`$(RUN) -c '$(MISSING)' $(NEEDS)` || exit 1; \
	if [ -n "$$missing" ]; then \
	    echo "make: '$(PY)' has no $$missing; install requirements.txt into it, or leave PY out." >&2; \
	    exit 1; \
	fi
else
setup: $(VENV)/.ready
endif

# .unfinished stands for the whole of an installation, so one that was cut short is started over. A .venv
# that was made by hand is completed in place.
$(VENV)/.ready: requirements.txt pyproject.toml $(VENV)/bin/python
	@if [ -e $(VENV)/.unfinished ] || ! $(VENV)/bin/python -c '$(SUITABLE)' 2>/dev/null; then \
	    for python in $(CANDIDATES) none; do \
	        if $$python -c '$(SUITABLE)' 2>/dev/null; then break; fi; \
	    done; \
	    if [ $$python = none ]; then \
	        found=`$(PYTHON) --version 2>&1` || found="not there"; \
	        echo "make: Python 3.11, 3.12 or 3.13 is needed, and $(PYTHON) is $$found:" \
	            "name one, as in make setup PYTHON=/path/to/python3.12" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with `$$python --version`"; \
	    rm -rf $(VENV) && mkdir $(VENV) && touch $(VENV)/.unfinished && $$python -m venv $(VENV) || exit 1; \
	fi
	@rm -f $@ && touch $(VENV)/.unfinished
	@echo "Installing requirements.txt into $(VENV) (on Linux several GB: PyTorch comes with CUDA)"
	@$(INSTALL) -r requirements.txt
	@$(INSTALL) --quiet --no-deps --no-build-isolation --editable .
	@mv $(VENV)/.unfinished $@

$(VENV)/bin/python: ;

# papermill's own stderr is shown only if it fails; what a notebook prints is shown as it comes.
figures: setup
	@out="$${PA_RUNS:-runs}/notebooks"; mkdir -p "$$out" figures/quick && touch "$$out/.started" || exit 1; \
	for name in $(NOTEBOOKS); do \
	    echo "== notebooks/$$name.ipynb"; start=`date +%s`; \
	    $(RUN) -m papermill "notebooks/$$name.ipynb" "$$out/$$name.ipynb" --kernel python3 \
	        --no-progress-bar --log-level WARNING --stdout-file - --stderr-file - 2> "$$out/$$name.err" || { \
	            cat "$$out/$$name.err" >&2; rm -f "$$out/$$name.err" "$$out/.started"; \
	            echo "make figures: notebooks/$$name.ipynb failed; as far as it got, it is $$out/$$name.ipynb" >&2; \
	            exit 1; }; \
	    rm -f "$$out/$$name.err"; \
	    echo "== done in $$((`date +%s` - start)) s"; echo; \
	done; \
	count=`find figures/quick -name '*.png' -newer "$$out/.started" | wc -l | tr -d ' '`; \
	rm -f "$$out/.started"; \
	echo "Figures: $$count in figures/quick/, each as .png and .svg with its .csv and .json"; \
	echo "Executed notebooks: $$out/"

# Two processes, each a whole file at a time, the notebooks as one; make test SPREAD= is one process.
SPREAD ?= -n 2

# The notebooks get a runs folder of their own, so that every run in them is really made.
test: setup
	@runs=`mktemp -d` || exit 1; \
	trap 'rm -rf "$$runs"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	PA_RUNS="$$runs" $(RUN) -m pytest tests notebooks $(SPREAD) \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=900 --durations=10

lab: setup
	@$(RUN) -m jupyterlab --FileContentsManager.preferred_dir=notebooks $(ARGS)

bench: setup
	@$(RUN) -m tests.bench $(BENCH)

study: setup
	@$(RUN) -m pa_core.study $(STUDY) $(ARGS)

clean:
	@rm -rf figures/quick build .pytest_cache .hypothesis .ruff_cache *.egg-info
	@find pa_core tests notebooks -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
