#!/usr/bin/env bash
# The same path on a tiny stand-in, on any machine, in under a minute: a random Qwen3 of the same architecture, a
# handful of problems, two steps. Says nothing about learning, everything about whether the recipe runs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python "$here/stand_in.py" "$work"
"$here/train.sh" --hf-checkpoint "$work/model" --run-dir "$work/run" \
  --prompt-data "$work/train.jsonl" --input-key question --label-key answer \
  --data.sets.default.sampling.max_new_tokens=8 --rollout-max-prompt-len 256 \
  --eval.sets.gsm8k.path="$work/test.jsonl" --eval.sets.gsm8k.sampling.max_new_tokens=8 \
  --num-rollout 2 --rollout-batch-size 2 --n-samples-per-prompt 4 --rollout-filters '[]' \
  --eval-interval 1 --save-interval 1
python - "$work/run" <<'PY'
import json, pathlib, sys

run = pathlib.Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
assert summary["status"] == "completed" and summary["steps"] == 2, summary
assert (run / "hf/2/model.safetensors").exists() or list((run / "hf/2").glob("*.safetensors"))
metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
assert all(m["train/train_rollout_logprob_abs_diff"] < 0.05 for m in metrics[1:]), metrics
print("the recipe runs: 2 steps,", summary["tokens"])
PY
