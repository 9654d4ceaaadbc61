#!/usr/bin/env bash
# The embedded task on several seeds (data, initial weights, sampling), with every decision weighting:
#
#     VENV=.venv benchmarks/chain_sum_seeds.sh 0 1 2
#
# Writes runs/seeds/SEED/{data,hft,winner,saturating,uniform,eval/...} and one report on all of them, runs/seeds/report.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
recipes=recipes/chain-sum
evaluations=()

for seed in "${@:-0}"; do
  run=runs/seeds/$seed
  "$bin/hgpo-trl" data --config $recipes/data.yaml --seed "$seed" --output_dir "$run/data"
  "$bin/hgpo-trl" hft --config $recipes/hft.yaml --seed "$seed" --output_dir "$run/hft" \
    --model_name_or_path "$run/data/base" --train_data "$run/data/hft.parquet"
  for weighting in winner saturating uniform; do
    "$bin/hgpo-trl" hgpo --config $recipes/hgpo.yaml --seed "$seed" --output_dir "$run/$weighting" \
      --model_name_or_path "$run/hft" --train_data "$run/data/hgpo.parquet" --decision_weighting $weighting
  done
  for model in hft winner saturating uniform; do
    "$bin/hgpo-trl" evaluate --config $recipes/evaluate.yaml --model "$run/$model" \
      --data "$run/data/eval.parquet" --output_dir "$run/eval/$model"
    evaluations+=("$model-$seed=$run/eval/$model")
  done
done
"$bin/hgpo-trl" report --evaluations "${evaluations[@]}" --output_dir runs/seeds/report --title "Chain sums, several seeds"
