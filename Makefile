# Long forms of what the README says; `make help` lists them.
PYTHON ?= .venv/bin/python

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

environment:  ## a virtual environment with everything for development
	python3 -m venv .venv
	.venv/bin/pip install -e ".[dev]"

audit:  ## the main job on the embedded model and messages
	.venv/bin/lmleak audit

test:  ## all tests
	$(PYTHON) -m pytest -n 2 --dist loadfile

quick-test:  ## tests without the slow and multi-process ones
	$(PYTHON) -m pytest -m "not slow and not multiprocess and not network"

lint:  ## style and docstring rules
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

reference-models:  ## train the two embedded models again
	.venv/bin/accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/train_reference_models.py --config configs/train_reference_models/bert.yaml
	.venv/bin/accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/train_reference_models.py --config configs/train_reference_models/gpt2.yaml

study:  ## risk numbers against attacks on the embedded models
	.venv/bin/accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/influence_vs_attack.py --config configs/influence_vs_attack/reference-bert.yaml
	.venv/bin/accelerate launch --config_file configs/accelerate/cpu1.yaml recipes/influence_vs_attack.py --config configs/influence_vs_attack/reference-gpt2.yaml

benchmark:  ## cost of the risk numbers at BERT-base and GPT-2 small shapes
	$(PYTHON) -m benchmarks.influence

.PHONY: help environment audit test quick-test lint reference-models study benchmark
