# `make compare-rules`: the rules for learning when to think, from the same HFT model with equal rollout tokens. Learning
# rate and weight of each are chosen on a seed of its own by the same search. An interrupted comparison goes on with what
# is missing. The page: runs/compare-rules/rules.md
R ?= runs/compare-rules
SEEDS ?= 0 1 2# of data, initial weights and sampling
SEARCH_SEED ?= 3
RULES ?= hgpo lazy adaptthink thinkless stable_adaptive grpo reinforce_plus_plus# of benchmarks/rule_run.py
LEARNING_RATES ?= 1e-3 2e-3 4e-3
TOKENS ?= 300000# sampled in the rollouts of a run
SEARCH_TOKENS ?= 100000# the same of a run of the search
include benchmarks/stages.mk

ONE := recipes/chain-sum
RUN := python benchmarks/rule_run.py
CANDIDATES := $(foreach rate,$(LEARNING_RATES),$(rate)-high $(rate)-low)

# $(call reference,SEED,RULE): what AdaptThink compares with
reference = $(if $(filter adaptthink,$(2)),$(R)/$(1)/samples/report.json)

# $(call candidate,RULE,LEARNING RATE,WEIGHT)
define candidate
$(R)/search/$(1)/$(2)-$(3)/model.safetensors: $(R)/$(SEARCH_SEED)/hft/model.safetensors $(call reference,$(SEARCH_SEED),$(1))
	$$(call run,search-$(1)-$(2)-$(3),$(RUN) --rule $(1) --learning_rate $(2) --weight $(3) --seed $(SEARCH_SEED) --runs $(R)/$(SEARCH_SEED) --tokens $(SEARCH_TOKENS) --output_dir $$(@D))
endef

# $(call rule,SEED,RULE)
define rule
$(R)/$(1)/$(2)/model.safetensors: $(R)/$(1)/hft/model.safetensors $(call reference,$(1),$(2)) $(CANDIDATES:%=$(R)/search/$(2)/%/model.safetensors)
	$$(call run,$(1)-$(2),$(RUN) --rule $(2) --best_of $(R)/search/$(2) --seed $(1) --runs $(R)/$(1) --tokens $(TOKENS) --output_dir $$(@D))
$(call evaluation,$(1),$(2),$(2),$(ONE),$(R)/$(1)/data/eval.parquet)
endef

define seed
$(call stages,$(1),,$(ONE),)
$(call samples,$(1),,$(ONE))
endef

$(foreach s,$(SEARCH_SEED) $(SEEDS),$(eval $(call seed,$(s))))
$(foreach r,$(RULES),$(foreach l,$(LEARNING_RATES),$(foreach w,low high,$(eval $(call candidate,$(r),$(l),$(w))))))
$(foreach s,$(SEEDS),$(foreach r,$(RULES),$(eval $(call rule,$(s),$(r)))))

SEARCHED := $(foreach c,$(CANDIDATES),$(RULES:%=$(R)/search/%/$(c)/model.safetensors))
REPORTS := $(foreach s,$(SEEDS),$(foreach m,$(RULES) hft,$(R)/$(s)/eval/$(m)/report.json))

# All rules get on together in the search, and then on one seed after the other: an interrupted comparison is fair.
.PHONY: all
all: $(SEARCHED) $(REPORTS)
	$(BIN)/python benchmarks/rule_comparison.py --runs $(R) --seeds $(SEEDS) --rules $(RULES) --output_dir $(R)
