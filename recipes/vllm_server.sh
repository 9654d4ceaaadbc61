#!/usr/bin/env bash
# Stage II on one node with vLLM as a server: some GPUs sample, the others train; the server ends with the training.
#
#   recipes/vllm_server.sh qwen2.5-math-7b [--FIELD VALUE ...]
#
# The recipe is recipes/NAME/hgpo_server.yaml, written for 4 training GPUs: with another number give
# --gradient_accumulation_steps, too. Arguments override fields of the training, not what the server reads.
#   SERVER_GPUS, TRAIN_GPUS  which GPUs sample, each with a whole copy of the model, and train (4,5,6,7 and 0,1,2,3)
#   ACCELERATE               config in recipes/accelerate (zero3 for a 7B model, else zero2)
#   SERVER_TIMEOUT           seconds until the server must answer (1800)
#   SERVER_MEMORY            vLLM's share of each of its GPUs (0.9)
set -euo pipefail

if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: recipes/vllm_server.sh RECIPE [--FIELD VALUE ...]; RECIPE: folder of recipes/ with hgpo_server.yaml" >&2
  exit 2
fi
name=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=recipes/$name/hgpo_server.yaml
SERVER_GPUS=${SERVER_GPUS:-4,5,6,7}
TRAIN_GPUS=${TRAIN_GPUS:-0,1,2,3}
if [[ -z ${ACCELERATE:-} ]]; then
  [[ $name == *-7b ]] && ACCELERATE=zero3 || ACCELERATE=zero2
fi

field() { sed -n "s/^$1: *\([^ #]*\).*/\1/p" "$recipe"; }  # a plain value of the recipe
count() { tr ',' '\n' <<<"$1" | wc -l; }
port=$(field vllm_server_port)

# Development mode opens the endpoints that take new weights; the log-probabilities must be those after the temperature.
CUDA_VISIBLE_DEVICES=$SERVER_GPUS VLLM_SERVER_DEV_MODE=1 vllm serve "$(field model_name_or_path)" \
  --host 127.0.0.1 \
  --port "$port" \
  --data-parallel-size "$(count "$SERVER_GPUS")" \
  --dtype bfloat16 \
  --max-model-len "$(field vllm_max_model_length)" \
  --gpu-memory-utilization "${SERVER_MEMORY:-0.9}" \
  --weight-transfer-config '{"backend": "nccl"}' \
  --logprobs-mode processed_logprobs \
  --max-logprobs -1 &
server=$!
training=
stop() {
  local pid
  for pid in $training $server; do
    kill "$pid" 2>/dev/null || true
  done
  for pid in $training $server; do
    wait "$pid" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'exit 143' TERM INT

deadline=$((SECONDS + ${SERVER_TIMEOUT:-1800}))
until curl --silent --fail --output /dev/null "http://127.0.0.1:$port/health"; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "The vLLM server has ended before it was ready; its last lines above say why." >&2
    exit 1
  fi
  if ((SECONDS > deadline)); then
    echo "The vLLM server does not answer after ${SERVER_TIMEOUT:-1800} seconds." >&2
    exit 1
  fi
  sleep 2
done

CUDA_VISIBLE_DEVICES=$TRAIN_GPUS accelerate launch \
  --config_file "recipes/accelerate/$ACCELERATE.yaml" \
  --num_processes "$(count "$TRAIN_GPUS")" \
  -m hgpo_trl.scripts.hgpo --config "$recipe" "$@" &
training=$!

# Whichever ends first ends both: a training without its server would wait for it until a timeout.
while kill -0 "$training" 2>/dev/null; do
  if ! kill -0 "$server" 2>/dev/null; then
    echo "The vLLM server has ended during the training." >&2
    exit 1
  fi
  sleep 2
done
wait "$training"
