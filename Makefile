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
NEEDS := torch torchvision timm captum papermill matplotlib pandas sklearn statsmodels pydantic yaml filelock safetensors psutil tqdm
MISSING := import sys, importlib.util as u; print(*[m for m in sys.argv[1:] if not u.find_spec(m)])
else
RUN = PYTHONPATH="$(CURDIR)" $(VENV)/bin/python
endif
INSTALL = PYTHONPATH= $(VENV)/bin/python -m pip --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help setup figures test lint check notebooks lab bench study clean

help:
	@echo "make figures    run the notebooks on the embedded data; figures go into figures/quick/"
	@echo "make lab        JupyterLab with copies of the notebooks in my_notebooks/ (options: make lab ARGS='--no-browser --port 9999')"
	@echo "make test       pytest over tests/, and nbval over the notebooks"
	@echo "make lint       ruff check, ruff format --check and basedpyright"
	@echo "make check      lint and the tests that matter most, in under 90 s"
	@echo "make bench      the benchmarks, or one of them: make bench BENCH=heatmaps"
	@echo "make study      the runs of a study and its figures in figures/: make study STUDY=a (ARGS=--estimate: how long it takes)"
	@echo "make notebooks  execute the committed notebooks and write them in place, all from one execution"
	@echo "make setup      .venv from the pinned requirements.txt; every target above does this first"
	@echo "make clean      remove caches and figures/quick/; runs/, data/, my_notebooks/ and .venv/ stay"
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

# The tracked notebooks must have the default parameters, or the figures would be of other runs.
# papermill's own stderr is shown only if it fails; what a notebook prints is shown as it comes.
figures: setup
	@$(RUN) -m pa_core.lab.notebooks check
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

# What make check runs: the values that results depend on, the rules that keep runs apart, and a run that is resumed.
CHECKS := $(patsubst %,tests/test_%.py,setup golden params schedule masking selection batch statistics resume)

# The same metadata in every committed notebook, whatever made it; prints that follow one another are one output.
TIDY = --CoalesceStreamsPreprocessor.enabled=True --ClearMetadataPreprocessor.enabled=True \
    --ClearMetadataPreprocessor.preserve_cell_metadata_mask=tags \
    "--ClearMetadataPreprocessor.preserve_nb_metadata_mask={'kernelspec', ('language_info', 'name')}"

# The notebooks get a runs folder of their own, so that every run in them is really made.
test: setup
	@runs=`mktemp -d` || exit 1; \
	trap 'rm -rf "$$runs"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	PA_RUNS="$$runs" $(RUN) -m pytest tests notebooks $(SPREAD) \
	    --nbval-lax --nbval-current-env --nbval-cell-timeout=900 --durations=10

# basedpyright reads the packages of the interpreter that runs it.
lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m basedpyright --pythonpath "`$(RUN) -c 'import sys; print(sys.executable)'`"

check: lint
	@$(RUN) -m pytest $(CHECKS) $(SPREAD) --durations=5 \
	    --deselect tests/test_resume.py::test_killed_around_every_file_and_event

# Written only when all have been executed, with a runs folder of their own, so that they agree on every number.
# What the outputs say of that folder is what a reader's own would say.
notebooks: setup
	@made=`mktemp -d` || exit 1; \
	trap 'rm -rf "$$made"' EXIT; trap 'exit 130' INT; trap 'exit 143' TERM; \
	$(RUN) -m pa_core.lab.notebooks check || exit 1; \
	rm -rf figures/quick; \
	for name in $(NOTEBOOKS); do \
	    echo "== notebooks/$$name.ipynb"; \
	    PA_RUNS="$$made/runs" $(RUN) -m nbconvert --to notebook --execute "notebooks/$$name.ipynb" \
	        --output-dir "$$made" --log-level WARN --ExecutePreprocessor.kernel_name=python3 \
	        --ExecutePreprocessor.timeout=-1 --ExecutePreprocessor.record_timing=False || exit 1; \
	    $(RUN) -m nbconvert --to notebook --inplace "$$made/$$name.ipynb" --log-level WARN $(TIDY) || exit 1; \
	    sed -e "s|$$made/||g" -e "s|$(CURDIR)/||g" "$$made/$$name.ipynb" > "$$made/$$name.clean" || exit 1; \
	    if grep -n -e "$$made" -e "$(CURDIR)" -e "$$HOME/" "$$made/$$name.clean"; then \
	        echo "make notebooks: notebooks/$$name.ipynb would name a folder of this machine" >&2; exit 1; \
	    fi; \
	done; \
	for name in $(NOTEBOOKS); do cat "$$made/$$name.clean" > "notebooks/$$name.ipynb" || exit 1; done

# Copies, never overwritten, so that what JupyterLab saves changes no tracked notebook.
lab: setup
	@$(RUN) -m pa_core.lab.notebooks copy my_notebooks
	@python=`$(RUN) -c 'import sys; print(sys.executable)'` || exit 1; \
	root=`if [ "$$(id -u)" = 0 ]; then echo --allow-root; fi`; \
	PATH="`dirname "$$python"`:$$PATH" $(RUN) -m jupyterlab --FileContentsManager.preferred_dir=my_notebooks $$root $(ARGS)

bench: setup
	@$(RUN) -m tests.bench $(BENCH)

study: setup
	@$(RUN) -m pa_core.lab.study $(STUDY) $(ARGS)

clean:
	@rm -rf figures/quick build .pytest_cache .hypothesis .ruff_cache *.egg-info
	@find pa_core tests notebooks -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
