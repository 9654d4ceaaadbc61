# What `make reproduce` and `make compare-rules` share: each run is a file, so an interrupted make goes on with what is
# missing. R is the folder of the runs, BIN that of the programs.
BIN ?= .venv/bin
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all

# $(call run,NAME,COMMAND): the output goes to logs/NAME.log, the time to the terminal.
run = @mkdir -p $(R)/logs; begin=$$SECONDS; \
	if ! $(BIN)/$(2) > $(R)/logs/$(1).log 2>&1; then tail -n 20 $(R)/logs/$(1).log; exit 1; fi; \
	printf '%s  %4d s  %s\n' "$$(date +%T)" $$((SECONDS - begin)) $(1)

# $(call evaluation,SEED,FOLDER,MODEL,RECIPES,DATA)
define evaluation
$(R)/$(1)/eval/$(2)/report.json: $(R)/$(1)/$(3)/model.safetensors
	$$(call run,$(1)-$(2)-evaluate,hgpo-trl evaluate --config $(4)/evaluate.yaml --model $$(<D) --data $(5) --output_dir $$(@D))
endef

# $(call stages,SEED,PREFIX,RECIPES,DATA FIELDS,HFT FIELDS): data and HFT under SEED/PREFIX*
define stages
$(R)/$(1)/$(2)data/base/model.safetensors:
	$$(call run,$(1)-$(2)data,hgpo-trl data --config $(3)/data.yaml --seed $(1) --output_dir $(R)/$(1)/$(2)data $(4))
$(R)/$(1)/$(2)hft/model.safetensors: $(R)/$(1)/$(2)data/base/model.safetensors
	$$(call run,$(1)-$(2)hft,hgpo-trl hft --config $(3)/hft.yaml --seed $(1) --model_name_or_path $$(<D) --train_data $(R)/$(1)/$(2)data/hft.parquet --output_dir $$(@D) $(5))
$(call evaluation,$(1),$(2)hft,$(2)hft,$(3),$(R)/$(1)/$(2)data/eval.parquet)
endef

# $(call samples,SEED,PREFIX,RECIPES): the HFT model's own responses to the queries of Stage II
define samples
$(R)/$(1)/$(2)samples/report.json: $(R)/$(1)/$(2)hft/model.safetensors
	$$(call run,$(1)-$(2)samples,hgpo-trl evaluate --config $(3)/evaluate_baselines.yaml --model $$(<D) --data $(R)/$(1)/$(2)data/hgpo.parquet --output_dir $$(@D) --seed $(1))
endef
