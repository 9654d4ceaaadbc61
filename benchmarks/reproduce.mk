# `make reproduce`: the paper's Table 1 and Figures 3 to 6 on the embedded tasks, three seeds (data, initial weights,
# sampling). Two runs at a time; an interrupted one goes on with what is missing. The page: runs/reproduce/reproduction.md
R ?= runs/reproduce
SEEDS ?= 0 1 2
MARGINS ?= 0.45 0.7# beside 0.2 of the recipe; at N = 8 a mode's mean is a multiple of 1/4
HGPO ?=# fields of every HGPO run, beside the recipe's: --decision_weighting saturating
SMALL ?= 32# width of the smaller model; the recipe's is 64
include benchmarks/stages.mk

ESTIMATORS := grpo rloo reinforce_plus_plus
BASELINES := rft dpo rft-margin dpo-margin# the last two with the margin of hgpo.yaml
MODELS := hft $(BASELINES) $(ESTIMATORS) $(MARGINS:%=margin-%)
ONE := recipes/chain-sum
TWO := recipes/two-domains

# $(call hgpo,SEED,PREFIX,NAME,RECIPES,FIELDS)
define hgpo
$(R)/$(1)/$(2)$(3)/model.safetensors: $(R)/$(1)/$(2)hft/model.safetensors
	$$(call run,$(1)-$(2)$(3),hgpo-trl hgpo --config $(4)/hgpo.yaml --seed $(1) --model_name_or_path $$(<D) --train_data $(R)/$(1)/$(2)data/hgpo.parquet --output_dir $$(@D) $(5) $(HGPO))
$(call evaluation,$(1),$(2)$(3),$(2)$(3),$(4),$(R)/$(1)/$(2)data/eval.parquet)
endef

# $(call baseline,SEED,NAME,KIND,FIELDS)
define baseline
$(R)/$(1)/$(2)/model.safetensors: $(R)/$(1)/samples/report.json
	$$(call run,$(1)-$(2),hgpo-trl baselines $(3) --config $(ONE)/baselines_$(3).yaml $(4) --seed $(1) --model_name_or_path $(R)/$(1)/hft --samples $$(<D) --train_data $(R)/$(1)/data/hgpo.parquet --output_dir $$(@D))
$(call evaluation,$(1),$(2),$(2),$(ONE),$(R)/$(1)/data/eval.parquet)
endef

define seed
$(call stages,$(1),,$(ONE),)
$(call stages,$(1),small-,$(ONE),--hidden_size $(SMALL) --num_heads 1)
$(call stages,$(1),two-,$(TWO),)
$(call samples,$(1),$(ONE))
$(foreach kind,rft dpo,$(eval $(call baseline,$(1),$(kind),$(kind),)))
$(foreach kind,rft dpo,$(eval $(call baseline,$(1),$(kind)-margin,$(kind),--margin 0.2)))
$(foreach name,$(ESTIMATORS),$(eval $(call hgpo,$(1),,$(name),$(ONE),--estimator $(name))))
$(foreach margin,$(MARGINS),$(eval $(call hgpo,$(1),,margin-$(margin),$(ONE),--margin $(margin))))
$(call hgpo,$(1),small-,grpo,$(ONE),)
$(call hgpo,$(1),two-,grpo,$(TWO),)
endef

$(foreach s,$(SEEDS),$(eval $(call seed,$(s))))

EVALUATED := $(MODELS) small-hft small-grpo two-hft two-grpo
REPORTS := $(foreach s,$(SEEDS),$(EVALUATED:%=$(R)/$(s)/eval/%/report.json))

.PHONY: all
all: $(REPORTS)
	$(BIN)/python benchmarks/reproduction.py --runs $(R) --seeds $(SEEDS) --margins $(MARGINS) --output_dir $(R)
