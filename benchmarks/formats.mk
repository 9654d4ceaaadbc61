# The embedded task in the formats of models that already think. HFT in a format stands for their pretraining; Stage II
# starts from it as it is, as it would from Qwen3, and takes twice the demo's steps. An interrupted run goes on with what
# is missing:
#
#     make -f benchmarks/formats.mk                                    # every format, seed 0
#     make -f benchmarks/formats.mk FORMATS="lhrm qwen3" SEEDS="1 2"
#
# Writes runs/formats/FORMAT-SEED/{data,hft,hgpo,eval,log} and one report on all of them, runs/formats/report.
FORMATS ?= qwen3 lhrm deepseek-v3.1 r1 smollm3
SEEDS ?= 0
R ?= runs/formats
HGPO_TRL ?= .venv/bin/hgpo-trl
ONE := recipes/chain-sum
TOKENS := 60# the longest opening has three tokens more than that of lhrm
LONGER := --max_steps 560 --lr_scheduler_kwargs '{"num_decay_steps": 400, "decay_type": "linear", "min_lr_ratio": 0.05}'
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

# $(call stages,RUN,FORMAT,SEED)
define stages
$(R)/$(1)/data/base/model.safetensors:
	@mkdir -p $(R)/$(1)
	$(HGPO_TRL) data --config $(ONE)/data.yaml --seed $(3) --mode_format $(2) --output_dir $(R)/$(1)/data >> $(R)/$(1)/log 2>&1
$(R)/$(1)/hft/model.safetensors: $(R)/$(1)/data/base/model.safetensors
	$(HGPO_TRL) hft --config $(ONE)/hft.yaml --seed $(3) --mode_format $(2) --model_name_or_path $$(<D) --train_data $(R)/$(1)/data/hft.parquet --output_dir $$(@D) >> $(R)/$(1)/log 2>&1
$(R)/$(1)/hgpo/model.safetensors: $(R)/$(1)/hft/model.safetensors
	$(HGPO_TRL) hgpo --config $(ONE)/hgpo.yaml --seed $(3) $(LONGER) --max_completion_length $(TOKENS) --model_name_or_path $$(<D) --train_data $(R)/$(1)/data/hgpo.parquet --output_dir $$(@D) >> $(R)/$(1)/log 2>&1
$(R)/$(1)/eval/report.json: $(R)/$(1)/hgpo/model.safetensors
	$(HGPO_TRL) evaluate --config $(ONE)/evaluate.yaml --max_new_tokens $(TOKENS) --model $$(<D) --data $(R)/$(1)/data/eval.parquet --output_dir $$(@D) >> $(R)/$(1)/log 2>&1
endef

$(foreach format,$(FORMATS),$(foreach seed,$(SEEDS),$(eval $(call stages,$(format)-$(seed),$(format),$(seed)))))
RUNS := $(foreach seed,$(SEEDS),$(FORMATS:%=%-$(seed)))

.PHONY: all
all: $(RUNS:%=$(R)/%/eval/report.json)
	$(HGPO_TRL) report --evaluations $(foreach run,$(RUNS),$(run)=$(R)/$(run)/eval) --output_dir $(R)/report --title "Chain sums in every format"
