# Each target sets up .venv by itself, once: see tools/setup.sh.
# Another interpreter: make run PYTHON=python3.12
PYTHON ?=
export PYTHON
python := .venv/bin/python

.PHONY: help setup run lab test benchmark chart site links test-browser newest clean

help:
	@echo "make run     execute every notebook, write web pages of what that gave under build/"
	@echo "make lab     open JupyterLab in notebooks/"
	@echo "make test    unit tests, static checks, and nbval over every notebook"
	@echo "make benchmark ARGS='--checkpoint pocket-flux --only eager'"
	@echo "             measure combinations of quantization, offloading and compilation; ARGS='--help' lists the options"
	@echo "make site    web pages of the lessons as they are stored, and of README and results, under build/site/"
	@echo "make links   look up every link to elsewhere on the web"
	@echo "make test-browser"
	@echo "             the lessons in JupyterLab and their web pages in a real browser; wants Chromium or Chrome on PATH"
	@echo "make clean   remove what these made: .venv, build/ and caches"

setup:
	@sh tools/setup.sh

run: setup
	@$(python) tools/run_notebooks.py $(ARGS)

# Jupyter listens on 127.0.0.1, asks for its token, and asks nobody for news. As root, in a container, it wants
# --allow-root. Its root is this folder, and not notebooks/, so that links from a lesson to other folders work.
lab: setup
	@root=; if [ "$$(id -u)" = 0 ]; then root=--allow-root; fi; \
	exec $(python) -m jupyterlab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/notebooks \
		--ServerApp.contents_manager_class=tools.lab_contents.LessonContents \
		--LabApp.app_settings_dir="$(CURDIR)/tools/lab" --LabApp.news_url=None \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $$root $(ARGS)

# Unit tests and lessons run in two processes of one thread each, which tiny models are faster on.
# The same on every machine: pocket checkpoints, a cold compile cache, nobody's IPython profile. nbval's stored outputs
# come from a CPU with no network, so it sees neither a GPU nor the Hub.
test: setup
	@$(python) -m ruff format --check --diff .
	@$(python) -m ruff check .
	@set -e; unset TUTORIAL_MODELS; private=$$(mktemp -d); \
	trap 'rm -rf "$$private"' EXIT; trap 'exit 130' INT TERM; \
	export TORCHINDUCTOR_CACHE_DIR="$$private/inductor" IPYTHONDIR="$$private/ipython"; \
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist worksteal tests $(ARGS); \
	color=; [ -t 1 ] || color=--color=no; \
	CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(python) -m pytest $$color -n 2 --dist loadfile \
		-p tests.watch_kernel --nbval --nbval-current-env \
		--nbval-cell-timeout=180 --nbval-sanitize-with notebooks/nbval_sanitize.cfg notebooks

# Interrupted, it goes on with the next call.
benchmark: setup
	@$(python) -m benchmarks $(ARGS)

# The picture of README.md, from the recorded results.
chart: setup
	@$(python) tools/draw_results.py

# A link of a page to another, to a section or to a file that leads nowhere is an error.
site: setup
	@$(python) tools/pages.py $(ARGS)

links: setup
	@$(python) tools/pages.py --links $(ARGS)

# Seven minutes on two quiet cores. The browser is the system's; what drives it is installed here and not by setup,
# for nothing else needs it.
test-browser: setup
	@$(python) -m pip install --quiet --group browser
	@$(python) tools/browser.py $(ARGS)

# For the weekly run of CI: requirements.txt becomes the newest set that the ranges of pyproject.toml allow.
newest: setup
	@$(python) -m pip install --quiet --upgrade --upgrade-strategy eager -e .
	@$(python) -m pip list --format=freeze --exclude-editable --exclude pip | tr 'A-Z_' 'a-z-' | sed 's/+.*//' >requirements.txt

clean:
	rm -rf .venv build .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
