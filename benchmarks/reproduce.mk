# `make reproduce`: the paper's Table 1 and Figures 3 to 6 on the embedded tasks, three seeds (data, initial weights,
# sampling). Two runs at a time; an interrupted one goes on with what is missing. The page: runs/reproduce/reproduction.md
R ?= runs/reproduce
SEEDS ?= 0 1 2
MARGINS ?= 0.45 0.7# beside 0.2 of the recipe; at N = 8 a mode's mean is a multiple of 1/4
SMALL ?= --num_layers 1# the smaller model; the recipe's has two layers
SHORT ?= 700# steps of the short Stage I; the recipe's is of 1,800
include benchmarks/stages.mk

ESTIMATORS := grpo rloo reinforce_plus_plus
BASELINES := rft dpo rft-margin dpo-margin# the last two with the margin of hgpo.yaml
MODELS := hft $(BASELINES) $(ESTIMATORS) $(MARGINS:%=margin-%)
ONE := recipes/chain-sum
TWO := recipes/two-domains
LIKE := --tasks hgpo_trl.tasks.chain_sum benchmarks/chain_difference.py# in place of the shell game

# $(call hgpo,SEED,PREFIX,NAME,RECIPES,FIELDS)
define hgpo
$(R)/$(1)/$(2)$(3)/model.safetensors: $(R)/$(1)/$(2)hft/model.safetensors
	$$(call run,$(1)-$(2)$(3),hgpo-trl hgpo --config $(4)/hgpo.yaml --seed $(1) --model_name_or_path $$(<D) --train_data $(R)/$(1)/$(2)data/hgpo.parquet --output_dir $$(@D) $(5))
$(call evaluation,$(1),$(2)$(3),$(2)$(3),$(4),$(R)/$(1)/$(2)data/eval.parquet)
endef

# $(call baseline,SEED,PREFIX,NAME,KIND,FIELDS)
define baseline
$(R)/$(1)/$(2)$(3)/model.safetensors: $(R)/$(1)/$(2)samples/report.json
	$$(call run,$(1)-$(2)$(3),hgpo-trl baselines $(4) --config $(ONE)/baselines_$(4).yaml $(5) --seed $(1) --model_name_or_path $(R)/$(1)/$(2)hft --samples $$(<D) --train_data $(R)/$(1)/$(2)data/hgpo.parquet --output_dir $$(@D))
$(call evaluation,$(1),$(2)$(3),$(2)$(3),$(ONE),$(R)/$(1)/$(2)data/eval.parquet)
endef

# with commas, which end an argument of `call`
SHORT_STAGE = --max_steps $(SHORT) --lr_scheduler_kwargs '{num_decay_steps: $(shell expr $(SHORT) / 2), decay_type: linear, min_lr_ratio: 0.02}'

define seed
$(call stages,$(1),,$(ONE),)
$(call stages,$(1),small-,$(ONE),$(SMALL))
$(call stages,$(1),two-,$(TWO),)
$(call stages,$(1),like-,$(TWO),$(LIKE))
$(call stages,$(1),short-,$(ONE),,$$(SHORT_STAGE))
$(call samples,$(1),,$(ONE))
$(foreach prefix,small- short-,$(eval $(call samples,$(1),$(prefix),$(ONE))))
$(foreach kind,rft dpo,$(eval $(call baseline,$(1),,$(kind),$(kind),)))
$(foreach kind,rft dpo,$(eval $(call baseline,$(1),,$(kind)-margin,$(kind),--margin 0.2)))
$(foreach prefix,small- short-,$(eval $(call baseline,$(1),$(prefix),rft-margin,rft,--margin 0.2)))
$(foreach name,$(ESTIMATORS),$(eval $(call hgpo,$(1),,$(name),$(ONE),--estimator $(name))))
$(foreach margin,$(MARGINS),$(eval $(call hgpo,$(1),,margin-$(margin),$(ONE),--margin $(margin))))
$(call hgpo,$(1),small-,grpo,$(ONE),)
$(call hgpo,$(1),short-,grpo,$(ONE),)
$(call hgpo,$(1),two-,grpo,$(TWO),)
$(call hgpo,$(1),like-,grpo,$(TWO),)
endef

$(foreach s,$(SEEDS),$(eval $(call seed,$(s))))

EVALUATED := $(MODELS) two-hft two-grpo like-hft like-grpo $(foreach prefix,small- short-,$(prefix)hft $(prefix)rft-margin $(prefix)grpo)
REPORTS := $(foreach s,$(SEEDS),$(EVALUATED:%=$(R)/$(s)/eval/%/report.json))

.PHONY: all
all: $(REPORTS)
	$(BIN)/python benchmarks/reproduction.py --runs $(R) --seeds $(SEEDS) --margins $(MARGINS) --output_dir $(R)
