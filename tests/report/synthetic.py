"""A run directory of any size, made up: `python tests/report/synthetic.py DIRECTORY [SAMPLES] [TOKENS]`.

Its numbers have the shape of a run's, and mean nothing. Some samples hold what would break a careless page.
"""

import json
import math
import random
import sys
from pathlib import Path

import yaml

HOSTILE = '</script><img src=x onerror="document.title=1"><script>document.title=2</script>'
WORDS = [
    "the",
    "a",
    "sum",
    "of",
    "two",
    "digits",
    "carries",
    "over",
    "so",
    "we",
    "add",
    "one",
    "and",
    "write",
    "down",
    "what",
    "is",
    "left",
    "then",
    "stop",
]
PER_STEP = 500


def write_run(
    directory: Path, samples: int = 1000, tokens: int = 60, seed: int = 0, vocabulary: int = 50_000, **settings
) -> Path:
    """`samples` samples of `tokens` tokens (a third of them prompt), 500 a step, in groups of five.

    `settings`: sections of the config in place of the made up ones.
    """
    draw = random.Random(seed)
    steps = math.ceil(samples / PER_STEP)
    (directory / "rollouts").mkdir(parents=True)
    config = {
        "run": {"name": directory.name, "dir": str(directory), "seed": seed},
        "model": {"hf_checkpoint": "somewhere/model"},
        "algorithm": {"advantage_estimator": {"name": "grpo"}, "policy_loss": {"name": "ppo_clip"}},
        "optimizer": {"lr": 1e-5},
        **settings,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    offers = {"advantage_estimators": ["grpo"], "policy_losses": ["ppo_clip", "reinforce"]}
    plugin = {"name": "grpo", "distribution": "miles-grpo", "version": "0.1.0", "components": offers}
    (directory / "plugins.json").write_text(json.dumps([plugin]))
    evaluation = {"heldout": {"first": {"accuracy": 0.1}, "last": {"accuracy": 0.8}}}
    summary = {"status": "completed", "steps": steps, "seconds": 3.0 * steps, "evaluation": evaluation}
    (directory / "summary.json").write_text(json.dumps(summary))
    with (directory / "metrics.jsonl").open("w") as file:
        file.writelines(json.dumps(metrics(step, draw)) + "\n" for step in range(steps + 1))
    for step in range(1, steps + 1):
        first = (step - 1) * PER_STEP
        with (directory / "rollouts" / f"step_{step:06d}.jsonl").open("w") as file:
            for i in range(first, min(first + PER_STEP, samples)):
                file.write(json.dumps(sample(i, step, tokens, vocabulary, draw)) + "\n")
    return directory


def metrics(step: int, draw: random.Random) -> dict:
    if step == 0:
        return {"step": 0, "eval/heldout/accuracy": 0.1, "perf/step_time": 1.0}
    progress = 1 - math.exp(-step / 40)
    row = {
        "step": step,
        "rollout/reward": 0.2 + 0.6 * progress + draw.gauss(0, 0.02),
        "train/entropy": 1.5 - progress + draw.gauss(0, 0.02),
        "train/grad_norm": math.exp(draw.gauss(0, 0.3)),
        "train/pg_clipfrac": abs(draw.gauss(0, 0.01)),
        "rollout/response_len/mean": 40 + draw.gauss(0, 2),
        "train/train_rollout_logprob_abs_diff": math.exp(draw.gauss(-12, 1)),
        "my_plugin/something": draw.random(),
        "perf/tokens_per_second": 4000 + draw.gauss(0, 200),
        "perf/rollout_time": 1 + draw.random() / 5,
        "perf/train_time": 1.5 + draw.random() / 5,
        "perf/step_time": 3.0,
    }
    return row | ({"eval/heldout/accuracy": 0.1 + 0.7 * progress} if step % 20 == 0 else {})


def sample(i: int, step: int, tokens: int, vocabulary: int, draw: random.Random) -> dict:
    prompt_length = tokens // 3
    said = tokens - prompt_length
    reward = round(draw.random(), 3)
    words = [draw.choice(WORDS) for _ in range(said)]
    if i % 100 == 7:
        words[0] = HOSTILE
    return {
        "id": i,
        "group_id": i // 5,
        "rollout_id": i,
        "prompt_id": f"sums:{i // 5}",
        "task_set": "sums" if i // 5 % 2 else "words",
        "prompt": [{"role": "user", "content": f"question {i // 5}: " + " ".join(WORDS[: prompt_length // 2])}],
        "response": " ".join(words),
        "label": str(i % 10),
        "status": "truncated" if i % 20 == 3 else "completed",
        "reward": reward,
        "reward_parts": {"right": float(reward > 0.5), "brief": round(reward / 2, 3)},
        "loss": round(draw.gauss(0, 0.1), 5),
        "error": None,
        "tokens": [draw.randrange(vocabulary) for _ in range(tokens)],
        "prompt_length": prompt_length,
        "turns": [{"start": prompt_length, "end": tokens, "finish_reason": "stop", "reward": None}],
        "loss_mask": [0] * prompt_length + [1] * said,
        "rollout_log_probs": [0.0] * prompt_length + [round(-draw.expovariate(1.0), 5) for _ in range(said)],
        "weight_version": [-1] * prompt_length + [step - 1] * said,
        "advantages": [0.0] * prompt_length + [round(2 * reward - 1, 5)] * said,
    }


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:]]
    print(write_run(Path(sys.argv[1]), *numbers))
