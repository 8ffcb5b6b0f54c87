# Everything here starts from a fresh clone: the virtual environment is made when it is missing or setup.py has changed.
COMMA := ,
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Where test-container puts the image: several GB.
IMAGE ?= build/image
# Processes of `make test`; each takes up to 3 GB.
JOBS ?= 2
INSTALLED := $(VENV)/.installed
# What a driver makes for each GPU; TensorFlow needs its CUDA libraries then.
NVIDIA ?= $(wildcard /dev/nvidia[0-9]*)
EXTRAS := $(if $(NVIDIA),gpu$(COMMA))dev

.PHONY: train test test-e2e test-browser test-container test-cluster test-control-plane test-story lint format clean

train: $(INSTALLED)  ## Train on the embedded MNIST, on every GPU of this machine or on the CPU. Flags: make train ARGS="--preset fast"
	$(BIN)/python -m trainer.task --strategy mirrored $(ARGS)

test: $(INSTALLED)  ## All tests but the long ones, in JOBS processes
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not e2e and not browser and not container and not cluster" $(ARGS)

test-e2e: $(INSTALLED)  ## The long tests: accuracy, equality of topologies, repeated kills
	$(BIN)/python -m pytest -m e2e $(ARGS)

test-browser: $(INSTALLED)  ## TensorBoard's pages, the report and trainer.serve's page in Chromium (installed before)
	$(BIN)/python -m pytest -m browser $(ARGS)

test-container: $(INSTALLED)  ## Builds the image (buildah, debootstrap; root) and runs it (runc)
	tests/container/build.sh $(IMAGE)
	DIGITFLEET_IMAGE=$(IMAGE) $(BIN)/python -m pytest -m container $(ARGS)

test-cluster: test-control-plane test-story  ## Kubernetes, built here (Go): every kind of job submitted, and jobs really run

test-control-plane: $(INSTALLED)  ## Every kind of job on a real API server, with JobSet, Kueue and nodes that kwok plays; built at first (a quarter of an hour)
	DIGITFLEET_CONTROL_PLANE="$$(tests/cluster/build.sh)" $(BIN)/python -m pytest -m cluster --ignore=tests/cluster/test_story.py $(ARGS)

test-story: $(INSTALLED)  ## On the cluster of KUBECONFIG with the image DIGITFLEET_IMAGE_NAME, or on nodes made here (root, containerd)
	PYTHON=$(abspath $(BIN)/python) tests/cluster/story.sh $(IMAGE) $(ARGS)

lint: $(INSTALLED)  ## Style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): setup.py pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 10) <= sys.version_info < (3, 14) else "digitfleet needs Python 3.10 to 3.13: make PYTHON=python3.11 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[$(EXTRAS)]'
	touch $@
