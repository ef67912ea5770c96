#!/usr/bin/env bash
# Measurements with SGLang on one or two GPUs, by name: one after the other, or side by side with a GPU each.
#
#   scripts/gpu/measure.sh                                        the names, with the seconds after which each is ended
#   scripts/gpu/measure.sh "dense sync-0.6B"                      one after the other, on all GPUs that are visible
#   scripts/gpu/measure.sh "dense" "wire-dense sync-0.6B"         side by side: the first on GPU 0, the others on GPU 1
#   scripts/gpu/measure.sh "killed" "sync-8B" "wire-moe"          a third list goes to GPU 0 again
#
# What NAME says is in $OUT/NAME.log (OUT=/tmp/out if not set) and what it found in $OUT/NAME/*.json; $ARCHIVE ($OUT/all.tgz)
# has all of it after each measurement. The end of every log is shown when it is over, whatever became of it.
set -uo pipefail
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1 # as in cases.py
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} OUT=${OUT:-/tmp/out}
ARCHIVE=${ARCHIVE:-$OUT/all.tgz}
unset TORCH_LOGS PYTORCH_CUDA_ALLOC_CONF # servers that share a GPU hand memory over, which expandable segments forbid
cd "$(dirname "$0")/../.." || exit 1

declare -A LIMIT COMMAND
measurement() { LIMIT[$1]=$2 COMMAND[$1]=$3; }
measurement cramped 200 "several.py cramped --steps 3 --limit 180"                   # two GPUs
measurement cramped-compiled 460 "several.py cramped-compiled --steps 3 --limit 440" # two GPUs
for job in dense moe torch torch-moe; do measurement $job 260 "sglang_job.py $job --limit 240"; done
for job in external ray; do measurement $job 260 "sglang_job.py $job --limit 240"; done # two GPUs
measurement fleet 500 "sglang_fleet.py tensor router"                                 # two GPUs
measurement killed 345 "sglang_job.py killed --limit 330"
measurement quickstart 420 "sglang_job.py quickstart --limit 280"
measurement quickstart-64 420 "sglang_job.py quickstart --limit 280 --seed 2 --head-dim 64" # where heads of 32 are too small
measurement throughput 440 "sglang_throughput.py --rounds 3 --limit 200"
for shape in 0.6B 4B 8B; do measurement sync-$shape 320 "sglang_sync.py $shape --limit 300"; done
for model in dense moe; do measurement wire-$model 260 "sglang_conformance.py --models $model"; done
measurement teacher 260 "sglang_teacher.py"
measurement modes 590 "sglang_modes.py decoupled-4 sync --steps 40 --warm 6 --lr 1e-6 --limit 285"         # two GPUs
measurement modes-more 590 "sglang_modes.py decoupled-3 async-4 --steps 40 --warm 6 --lr 1e-6 --limit 285" # two GPUs
measurement agent 230 "sglang_modes.py agent --steps 4 --warm 1 --limit 220"
measurement agent-async 230 "sglang_modes.py agent-async --steps 4 --warm 1 --limit 220" # two GPUs

measure() { # NAME
    local start=$SECONDS status=0
    mkdir -p "$OUT/$1"
    # shellcheck disable=SC2086 # words
    OUT=$OUT/$1 timeout -k 15 "${LIMIT[$1]}" "${PYTHON:-python3}" scripts/gpu/${COMMAND[$1]} ${MORE:-} \
        >"$OUT/$1.log" 2>&1 </dev/null || status=$?
    {
        flock 9
        tar -C "$OUT" --exclude='*.tgz*' --warning=no-file-changed -czf "$ARCHIVE.new" . # others write meanwhile
        mv "$ARCHIVE.new" "$ARCHIVE"
        echo "=== $1: status $status, $((SECONDS - start)) s"
        tail -c "${SHOWN:-2500}" "$OUT/$1.log"
    } 9>"$OUT/.lock"
}

(($#)) || { for name in "${!COMMAND[@]}"; do printf '%-14s %4d s  %s\n' "$name" "${LIMIT[$name]}" "${COMMAND[$name]}"; done | sort; exit; }
for name in $*; do [[ ${COMMAND[$name]:-} ]] || { echo "$0: no measurement is named $name" >&2; exit 2; }; done
mkdir -p "$OUT"
gpu=0
for list in "$@"; do
    (
        (($# > 1)) && export CUDA_VISIBLE_DEVICES=$((gpu % 2))
        for name in $list; do measure "$name"; done
    ) &
    gpu=$((gpu + 1))
done
wait
