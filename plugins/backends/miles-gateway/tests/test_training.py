"""A run that trains on what an agent said."""

import asyncio
import json

import openai
import pytest

import miles
from miles.testing import tiny


async def branching(base_url, prompt, request_kwargs, metadata, label):
    """Two turns, and a second opinion on the first one. Answers of few characters are worth more."""
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:

        async def say(messages):
            reply = await client.chat.completions.create(model="policy", messages=messages, **request_kwargs)
            message = reply.choices[0].message
            return [*messages, message]

        first = await say(prompt)
        sure = await say([*first, {"role": "user", "content": "sure?"}])
        other = await say([*first, {"role": "user", "content": f"{label}?"}])
    return {"reward": sum(-len(message.content) for message in (first[-1], sure[-1], other[-1]))}


SEEN = set()
"""Samples whose agents have been slow once."""


async def slow_at_first(base_url, prompt, request_kwargs, metadata, label, sample_id):
    """The same; every third group asks many small things before, at the first try."""
    if (sample_id // 4) % 3 == 2 and sample_id not in SEEN:
        SEEN.add(sample_id)
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            for _ in range(20):
                await client.chat.completions.create(model="policy", messages=prompt, max_tokens=1)
                await asyncio.sleep(0.05)
    return await branching(base_url, prompt, request_kwargs, metadata, label)


@pytest.fixture
def job(tmp_path, monkeypatch):
    checkpoint = tiny.checkpoint(tmp_path / "model", tiny.hf_config("llama", max_position_embeddings=512))
    rows = [{"input": [{"role": "user", "content": f"hello {i}"}], "label": str(i)} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task_set = {
        "name": "default",
        "path": str(tmp_path / "rows.jsonl"),
        "sampling": {"max_new_tokens": 8},
        "generate": {"name": "agent", "function": f"{__name__}:branching"},
    }
    evaluation = {**task_set, "name": "heldout", "sampling": {"max_new_tokens": 8, "temperature": 0}}
    return {
        "run": {"dir": str(tmp_path / "run"), "num_threads": 1, "report": False},
        "model": {"hf_checkpoint": str(checkpoint)},
        "data": {"sets": [task_set]},
        "rollout": {"num_rollout": 2, "batch_size": 4, "n_samples_per_prompt": 4},
        "algorithm": {"advantage_estimator": "grpo", "policy_loss": "ppo_clip"},
        "optimizer": {"lr": 1e-3},
        "eval": {"sets": [evaluation], "interval": 2},
    }


def test_a_run_with_an_agent(job):
    run = miles.train(job)
    assert run.status == "completed"
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rollout/reward" in line]
    assert len(trained) == 2
    for line in trained:
        assert line["rollout/generated_tokens"] == line["rollout/trained_tokens"], "every token is trained on, once"
        assert line["train/grad_norm"] > 0
        assert line["rollout/failed_ratio"] == 0
    assert run.evaluation["heldout"]["last"]["prompts"] == 8
    for path in sorted((run.directory / "rollouts").glob("*.jsonl")):
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == 2 * 16
        assert len({sample["id"] for sample in samples}) == 32
        assert len({sample["rollout_id"] for sample in samples}) == 16
        for sample in samples:
            assert len(sample["advantages"]) == len(sample["tokens"]), "each sibling has its own"
        for first, second in zip(samples[::2], samples[1::2], strict=True):
            assert (first["rollout_id"], first["reward"]) == (second["rollout_id"], second["reward"])
            assert first["tokens"] != second["tokens"]
            shared = first["turns"][0]["end"]
            assert first["tokens"][:shared] == second["tokens"][:shared]
            assert (any(first["loss_mask"][:shared]), any(second["loss_mask"][:shared])) == (True, False)


def test_two_runs_are_the_same(job, tmp_path):
    job["eval"] = {}
    found = []
    for name in ("one", "two"):
        job["run"]["dir"] = str(tmp_path / name)
        run = miles.train(job)
        found.append([path.read_text() for path in sorted((run.directory / "rollouts").iterdir())])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "rollout",
    [
        {"partial_rollout": True, "over_sampling_batch_size": 7},
        {"mode": "fully_async", "max_weight_staleness": 2, "pause_mode": "abort"},
    ],
)
def test_modes_in_which_turns_are_aborted(job, rollout):
    """Every rollout has its fate, and every token that is trained on its weights."""
    SEEN.clear()
    job["data"]["sets"][0]["generate"]["function"] = f"{__name__}:slow_at_first"
    job["rollout"] |= {**rollout, "num_rollout": 4}
    job["eval"] = {}
    if "mode" in rollout:
        job["resources"] = {"colocate": False}
    run = miles.train(job)
    assert run.status == "completed"
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "rollout/reward" in line]
    assert [line["rollout/samples/trained"] for line in trained] == [16.0] * 4
    restarted = sum(line.get("rollout/samples/restarted", 0) for line in trained)
    assert bool(restarted) == ("partial_rollout" in rollout), "an agent that was in the middle begins again, once"
    for path in sorted((run.directory / "rollouts").glob("*.jsonl")):
        for sample in map(json.loads, path.read_text().splitlines()):
            said = [
                version for version, mask in zip(sample["weight_version"], sample["loss_mask"], strict=True) if mask
            ]
            assert said
            assert min(said) >= 0
