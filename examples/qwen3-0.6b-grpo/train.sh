#!/usr/bin/env bash
# Train, or go on with a run that stopped. Everything after the script's name goes to `miles train`:
#
#   ./train.sh                                               # Qwen3-0.6B on GSM8K, both from the hub
#   ./train.sh --hf-checkpoint DIR --prompt-data FILE.jsonl --input-key input --label-key label
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
exec miles train "$here/config.yaml" "$@"
