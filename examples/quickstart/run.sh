#!/usr/bin/env bash
# Data, warm-up, reinforcement learning, and what came of it. Run again, it goes on where it stopped.
#
#   examples/quickstart/run.sh [--seed N] [--run NAME] [FLAG ...]     writes runs/quickstart/seed-N/NAME
#
# Every other flag goes to the reinforcement learning, for example: --run rloo --advantage-estimator rloo
# Runs of one seed share its data and its warm-up; NAME is `grpo` if not given.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
refuse() { echo "$0: $1" >&2; exit 2; }
seed=1 run=grpo flags=()
while (($#)); do
    case $1 in
        --seed) seed=${2:-}; [[ $seed ]] || refuse "--seed needs a value"; shift 2 ;;
        --run) run=${2:-}; [[ $run ]] || refuse "--run needs a value"; shift 2 ;;
        *) flags+=("$1"); shift ;;
    esac
done
case $run in data | sft | */*) refuse "--run $run: a plain name, and not data or sft" ;; esac
if ((${#flags[@]})) && [[ $run == grpo ]]; then
    refuse "with flags of its own the run needs a name of its own: --run NAME"
fi
mkdir -p "$here/../../runs/quickstart/seed-$seed"
cd "$here/../../runs/quickstart/seed-$seed"

[[ -d data ]] || { rm -rf data.part; python "$here/prepare.py" --out data.part --seed "$seed"; mv data.part data; }
echo "--- warm-up: imitating a pupil who forgets carries"
miles train "$here/sft.yaml" --seed "$seed" --rollout-seed "$seed"
echo "--- reinforcement learning: other sums, and only whether the answer is right"
miles train "$here/grpo.yaml" --seed "$seed" --rollout-seed "$seed" --run-dir "$run" --run-name "quickstart-$run" \
    ${flags[@]+"${flags[@]}"}
python "$here/show.py" "$run"
