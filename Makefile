# make setup | demo | test | bench | lint | format | clean
#
#   make setup                                the environment, in .venv
#   make setup DETECTRON2=<path|URL|requirement>   with another Detectron2; DETECTRON2=default goes back
#   make setup BASE_PYTHON=python3.12         on a Python of your choice
#   make demo TASK=bbox                       train, evaluate and draw on the generated shapes;
#                                             TASK: bbox, segm, pose_bbox, pose_kbox, joint or
#                                             joint_long, the only one of half an hour
#   make test ARGS="tests/layers -x"          pytest with further arguments, on up to four cores
#   make test PYTHON=python                   in an environment of your own instead of .venv
#   make bench ARGS="--threads 2"             speed and memory beside other models, in output/bench

VENV_PYTHON := .venv/bin/python
PYTHON ?= $(VENV_PYTHON)
BASE_PYTHON ?=
TASK ?= bbox
ARGS ?=

SETUP := python3 tools/setup_env.py $(if $(BASE_PYTHON),--python "$(BASE_PYTHON)")
DEMO_CONFIG := $(firstword $(wildcard configs/plus/shapes_$(TASK).yaml) configs/quick/shapes_$(TASK).yaml)
DEMO_OUTPUT := output/demo$(if $(filter-out bbox,$(TASK)),_$(TASK))

# Only our own environment is made or brought up to date.
ENV := $(if $(filter $(VENV_PYTHON),$(PYTHON)),environment)

.DEFAULT_GOAL := help
.PHONY: help setup environment demo test bench lint format clean

help:
	@sed -n '3,/^$$/s/^#   //p' Makefile

setup:
	@$(SETUP) $(ARGS)

environment:
	@$(SETUP) --quiet

demo: $(ENV)
	$(PYTHON) tools/train_net.py --config-file $(DEMO_CONFIG) $(ARGS) OUTPUT_DIR $(DEMO_OUTPUT)
	$(PYTHON) tools/visualize_data.py --config-file $(DEMO_CONFIG) --num 24 \
	    --predictions $(DEMO_OUTPUT)/inference/coco_instances_results.json \
	    --output-dir $(DEMO_OUTPUT)/pictures

test: $(ENV)
	$(PYTHON) -m pytest -q -n auto --maxprocesses 4 --dist worksteal $(ARGS)

bench: $(ENV)
	$(PYTHON) tools/benchmark.py $(ARGS)

lint: $(ENV)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(ENV)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# Generated data and caches; .venv stays (rm -r .venv removes it).
clean:
	rm -rf output build dist lsnet_d2.egg-info .pytest_cache .ruff_cache .hypothesis
	find lsnet_d2 projects tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
