#!/usr/bin/env bash
# Reinforcement learning on OpenReward environments; everything is written to runs/openreward.
#
#   run.sh                                              the games of this folder, and a tiny model: on a laptop's CPU
#   run.sh --config hosted.yaml --model Qwen/Qwen3-0.6B [FLAG VALUE ...] [-- FLAGS OF miles train ...]
#
#   --config FILE             environments; without it games.py is served here, and train_config.yaml taken
#   --model NAME              checkpoint, a folder or a name on the Hugging Face hub; without it a tiny one is made
#   --load DIR                start from the checkpoint of another run
#   --lr FLOAT                learning rate
#   --n-samples N             trajectories of each task
#   --rollout-batch-size N    tasks of a step
#   --max-response-len N      tokens of a turn
#   --temperature FLOAT       of sampling
#   --max-tokens-per-gpu N    of a micro-batch
#   --train-backend NAME
#   --actor-gpus N            GPUs that train
#   --rollout-gpus N          GPUs that engines have to themselves; without it they share those that train
#   --tp N                    GPUs of one engine; more than one with -- --rollout-engine sglang
#
# Run again, it goes on where it stopped.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
refuse() { echo "$0: $1" >&2; exit 2; }
absolute() { if [[ -e $1 ]]; then realpath "$1"; else echo "$1"; fi; }
listening() { (exec 3<>/dev/tcp/127.0.0.1/8080) 2>/dev/null; }

config="" model="" response="" temperature=1 flags=() extra=()
while (($#)); do
    case $1 in
        --) shift; extra=("$@"); break ;;
        --help | -h) sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//; p}' "$0"; exit ;;
    esac
    (($# > 1)) || refuse "$1 needs a value"
    case $1 in
        --config) config=$(absolute "$2") ;;
        --model) model=$(absolute "$2") ;;
        --load) flags+=(--load "$(absolute "$2")") ;;
        --n-samples) flags+=(--n-samples-per-prompt "$2") ;;
        --max-response-len) response=$2 ;;
        --temperature) temperature=$2 ;;
        --actor-gpus) flags+=(--actor-num-gpus-per-node "$2") ;;
        --rollout-gpus) flags+=(--rollout-num-gpus "$2") ;;
        --tp) flags+=(--rollout-num-gpus-per-engine "$2") ;;
        --lr | --rollout-batch-size | --max-tokens-per-gpu | --train-backend) flags+=("$1" "$2") ;;
        *) refuse "$1 is no flag of this script (see --help); flags of miles train go after --" ;;
    esac
    shift 2
done
[[ ! $config || $model ]] || refuse "--config needs --model: the tiny one knows the games of this folder and nothing else"
: "${response:=$([[ $model ]] && echo 1024 || echo 32)}"
mkdir -p "$here/../../runs/openreward"
cd "$here/../../runs/openreward"

if [[ ! $config ]]; then
    config=$here/train_config.yaml
    listening && refuse "something listens on 127.0.0.1:8080 already, where the games would be served"
    python "$here/games.py" --port 8080 & games=$!
    trap 'kill $games' EXIT
    until listening; do kill -0 $games || refuse "games.py did not start"; sleep 0.2; done
fi
python -m miles_openreward.prepare_tasks --config "$config" --output tasks

files=("$here/grpo.yaml")
if [[ $model ]]; then
    flags=(--hf-checkpoint "$model" ${flags[@]+"${flags[@]}"})
else
    files+=("$here/tiny.yaml")
    [[ -d pupil ]] || { rm -rf pupil.part; python "$here/pupil.py" --config "$config" --out pupil.part; mv pupil.part pupil; }
    echo "--- warm-up: imitating a pupil who plays badly"
    miles train "$here/sft.yaml"
fi
flags=("--data.sets.*.sampling.max_new_tokens=$response" "--data.sets.*.sampling.temperature=$temperature" ${flags[@]+"${flags[@]}"})
if grep -q '^eval:' tasks/tasks.yaml; then flags+=("--eval.sets.*.sampling.max_new_tokens=$response"); fi
echo "--- reinforcement learning"
miles train "${files[@]}" tasks/tasks.yaml "${flags[@]}" ${extra[@]+"${extra[@]}"}
