#!/usr/bin/env bash
# Data, warm-up, reinforcement learning, and what came of it. Run again, it goes on where it stopped.
#
#   examples/quickstart/run.sh [--seed N]        writes runs/quickstart/seed-N
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
seed=1
if [[ ${1:-} == --seed && -n ${2:-} ]]; then seed=$2; elif [[ $# -gt 0 ]]; then echo "usage: $0 [--seed N]" >&2; exit 2; fi
mkdir -p "$here/../../runs/quickstart/seed-$seed"
cd "$here/../../runs/quickstart/seed-$seed"

[[ -d data/model ]] || python "$here/prepare.py" --out data --seed "$seed"
echo "--- warm-up: imitating a pupil who forgets carries"
miles train "$here/sft.yaml" --seed "$seed" --rollout-seed "$seed"
echo "--- reinforcement learning: other sums, and only whether the answer is right"
miles train "$here/grpo.yaml" --seed "$seed" --rollout-seed "$seed"
python "$here/show.py" grpo
