"""Parts of a run that are put together from a config alone."""

import json
from types import SimpleNamespace

import pytest

from miles.api import Component, hookimpl
from miles.build import context_limit, make_probe, make_source, make_task
from miles.config import Config, TaskSet
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.rollout.engine_worker import EngineSetup
from miles.testing import tiny


@pytest.fixture(scope="module")
def registry():
    return Registry(load_plugins())


def chat_of_words():
    return SimpleNamespace(render_text=lambda text: list(range(len(text.split()))))


def model(**config):
    return SimpleNamespace(hf_config=SimpleNamespace(vocab_size=11, **config))


@pytest.mark.parametrize(
    ("data", "context_len", "lengths"),
    [({}, None, [1, 4, 7]), ({}, 5, [1, 4]), ({"max_prompt_len": 3}, 5, [1]), ({"max_prompt_len": 9}, 5, [1, 4])],
)
def test_prompts_that_leave_no_room_in_the_context_are_dropped(registry, tmp_path, data, context_len, lengths):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": "word " * n}) + "\n" for n in (1, 4, 7)))
    config = Config.model_validate({"data": {"sets": [{"path": str(path)}], **data}})
    built = model(max_position_embeddings=context_len)
    built.chat = chat_of_words()
    source = make_source(config, registry, built, config.data.sets, shuffle=False)
    assert [len(prompt.tokens) for prompt in source.every_prompt()] == lengths
    assert source.counts["too_long"] == 3 - len(lengths)


def test_the_context_is_as_long_as_the_config_or_the_model_says():
    assert context_limit(Config(), model(max_position_embeddings=64)) == 64
    assert context_limit(Config(), model()) is None
    limited = Config.model_validate({"rollout": {"max_context_len": 32}})
    assert context_limit(limited, model(max_position_embeddings=64)) == 32


class Replays:
    @hookimpl
    def miles_register_routing_replays(self):
        return {"replay": Component("parts:replay", needs={"routed_experts"})}


@pytest.mark.parametrize(
    ("replay", "evaluation", "asks"), [("replay", False, True), ("replay", True, False), ("none", False, False)]
)
def test_what_is_trained_with_a_replay_asks_for_expert_choices(replay, evaluation, asks):
    """Evaluation does not, nor do greedy baselines."""
    config = Config.model_validate({"moe": {"routing_replay": replay}})
    built = SimpleNamespace(chat=SimpleNamespace(stop_token_ids=()), hf_config=None)
    front = SimpleNamespace(generates=True, generate=None)
    registry = Registry(load_plugins(extra=[Replays()]))
    task = make_task(config, registry, built, front, TaskSet(), evaluation)
    assert (task.context.routed_experts, task.greedy.routed_experts) == (asks, False)


@pytest.mark.parametrize("replay", ["replay", "none"])
def test_engines_know_whether_they_will_be_asked_for_expert_choices(replay):
    config = Config.model_validate({"moe": {"routing_replay": replay}})
    setup = EngineSetup(config, config.rollout.engine, tiny.saved("qwen3_moe"), "cpu", load_weights=True)
    context = setup.context(Registry(load_plugins(extra=[Replays()])))
    assert context.routed_experts == (replay == "replay")


@pytest.mark.parametrize(
    ("sections", "exact"),
    [({}, False), ({"run": {"deterministic": True}}, True), ({"train": {"reproducible_ranks": 4}}, True)],
)
def test_engines_know_whether_every_bit_counts(registry, sections, exact):
    config = Config.model_validate(sections)
    setup = EngineSetup(config, config.rollout.engine, tiny.saved("qwen3"), "cpu", load_weights=True)
    assert setup.context(registry).exact == exact


@pytest.mark.parametrize(
    ("positions", "max_len", "length"), [(1000, None, 48), (30, None, 30), (30, 20, 20), (1000, 40, 40)]
)
def test_the_weight_probe_fits_model_and_engine(registry, positions, max_len, length):
    engine = SimpleNamespace() if max_len is None else SimpleNamespace(max_len=max_len)
    probe = make_probe(Config(), registry, model(max_position_embeddings=positions), [engine])
    assert [len(tokens) for tokens in probe.table.tokens] == [length] * 4
