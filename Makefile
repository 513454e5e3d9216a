# Every target but gpu makes its own virtual environment first; PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# A file's tests stay together: some share what takes minutes to make. (Groups of pytest-xdist 3.8, which
# would keep all tests of ranks in one worker, have no effect under pytest 9.2.) A worker has a processor of its
# own: threads of torch would wait for each other on it. Tests about threads set their number themselves.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/capability/*)

.PHONY: help install finetune finetune-short low-precision test test-slow bench gpu check format docs dist info clean

help:
	@echo "make install         the virtual environment and the package in it; other targets do this first"
	@echo "make finetune        the main job: fine-tune a small encoder on real data (under three minutes)"
	@echo "make finetune-short  the same in little: whether everything runs"
	@echo "make low-precision   fine-tuning in fp32 and bf16: what each way of keeping bf16 weights gives (some minutes)"
	@echo "make test            all tests"
	@echo "make test-slow       the long sweeps too"
	@echo "make bench           benchmarks against torch.optim.AdamW"
	@echo "make gpu             check and measure on this machine's GPU, offline (under 8 minutes); ARGS='--sweep'"
	@echo "make check           ruff and mypy"
	@echo "make format          ruff's fixes and format"
	@echo "make docs            the documentation as a site, in build/site"
	@echo "make dist            source distribution and wheel, in dist (compiles anew: minutes)"
	@echo "make info            what is installed, which backend serves what, a self-check"
	@echo "make clean           remove the virtual environment and what was built"

install: $(VENV)/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or later is needed; name one with 'make PYTHON=python3.12 ...'"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }

# torch comes first and builds are not isolated: isolation would fetch a second torch to build against.
$(VENV)/.installed: $(SOURCES) | $(BIN)/python
	@echo "installing torch and the build tools into $(VENV) ..."
	@$(PIP) torch setuptools ninja
	@echo "building the extension and installing childtune_kernels ..."
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

finetune: install
	$(BIN)/python examples/finetune.py

finetune-short: install
	$(BIN)/python examples/finetune.py --short

low-precision: install
	$(BIN)/python examples/low_precision.py

test: install
	$(PYTEST)

test-slow: install
	$(PYTEST) -m 'slow or not slow'

bench: install
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# A machine with a GPU often has a torch of its own and no network: what is there is used, nothing is fetched.
gpu:
	$(if $(wildcard $(VENV)/.installed),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site's theme prints a notice about its successor to every build.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "build/site/index.html"

# The wheel is built from the source distribution, which shows that nothing is missing from it.
dist: install
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist

info: install
	$(BIN)/python -m childtune_kernels info

clean:
	rm -rf $(VENV) build dist *.egg-info childtune_kernels/_C*.so childtune_kernels/_extension_absent.txt
