"""Rewards and filters in every signature that slime and Miles call."""

from __future__ import annotations

import asyncio

import pytest

from miles.api import Group, HookError, Prompt, RolloutError, Sample, Status


@pytest.fixture
def group(bench):
    """`group("text", ...)`: finished samples of one prompt, whose tokens are their texts'."""

    def make(*texts: str, **of_prompt) -> Group:
        given = {"text": "hello", "label": "yes", "tokens": bench.chat.render_text("hello"), **of_prompt}
        prompt = Prompt("default:0", "default", **given)
        samples = []
        for i, text in enumerate(texts):
            sample = Sample.begin(prompt, id=i, group_id=1)
            sample.append([*bench.chat.render_text(text), bench.chat.stop_token_ids[0]], {})
            sample.text, sample.status = text, Status.COMPLETED
            samples.append(sample)
        return Group(1, prompt, samples)

    return make


def scores(bench, group, **options):
    return list(asyncio.run(bench.build("rewards", **options).score_group(group)))


def test_one_sample_at_a_time(bench, group):
    """It looks finished: the response as SGLang says it, with its end token."""
    assert scores(bench, group("yes", "no"), path="judges.exact") == [{"reward": 1.0}, {"reward": 0.0}]
    assert scores(bench, group("yes"), path="judges:at_once") == [{"reward": len("yes<|im_end|>")}]


def test_a_mapping_with_its_key(bench, group):
    told = scores(bench, group("yes", "no"), path="judges.as_mapping", reward_key="score")
    assert told == [{"acc": 1.0, "reward": 1.0}, {"acc": 0.0, "reward": -1.0}]


def test_a_mapping_without_a_key_is_an_error_that_says_so(bench, group):
    (error,) = scores(bench, group("yes"), path="judges.as_mapping")
    assert isinstance(error, RolloutError)
    assert "score, acc, pred: --reward-key says which is the reward" in str(error)
    (other,) = scores(bench, group("yes"), path="judges.as_mapping", reward_key="points")
    assert "--reward-key points is not among them" in str(other)
    (number,) = scores(bench, group("yes"), path="judges.exact", reward_key="score")
    assert "returned 1.0, which is no mapping" in str(number)


def test_a_group_at_once(bench, group):
    told = scores(bench, group("yes", "yesyes"), path="judges.of_a_group", group_rm=True)
    assert told == [{"reward": 4 / 7}, {"reward": 1.0}]


def test_another_number_of_rewards_than_samples(bench, group):
    for error in scores(bench, group("a", "b"), path="judges.too_few", group_rm=True):
        assert str(error) == "judges.too_few returned 1 rewards for 2 samples"


def test_a_judge_that_raises_is_the_samples_fault(bench, group):
    for error in scores(bench, group("a", "b"), path="judges.failing"):
        assert isinstance(error, RuntimeError)


def test_label_metadata_and_attributes_arrive(bench, group):
    made = group("yes", metadata={"level": 10})
    made.samples[0].metadata["slime_function"] = {"further": {"tool_calls": 100}}
    assert scores(bench, made, path="judges.with_label_and_metadata") == [{"reward": 113.0}]


def test_siblings_are_judged_in_one_call_and_what_has_a_reward_is_not(bench, configured):
    configured("--custom-generate-function-path", "several.solvers", "--custom-rm-path", "judges.of_either")
    made = bench.generate("several.solvers", bench.script(("hello", "stop")))
    assert [one.reward for one in made] == [None, None], "the reward that is configured says it"
    group = Group(1, made[0].prompt, made)
    assert scores(bench, group, path="judges.of_either") == [{"reward": 0.25}, {"reward": 1.0}]


def test_a_function_may_ask_for_the_runs_own_reward(bench, configured):
    configured("--custom-generate-function-path", "several.judged", "--custom-rm-path", "judges.of_either")
    (made,) = bench.generate("several.judged", bench.script(("hello", "stop")))
    assert made.metadata["judged"] is True
    group = Group(1, made.prompt, [made])
    assert scores(bench, group, path="judges.failing") == [{"reward": 1.0}]


def test_retool_and_its_reward(bench, configured):
    """An attribute that the generate function has set is there in the reward function."""
    configured("--custom-rm-path", "retool.reward_func", "--reward-key", "score")
    sample = bench.generate("retool.generate", bench.script(("add 1 1", "stop"), ("hello", "stop")))
    (right,) = scores(bench, Group(1, sample.prompt, [sample]), path="retool.reward_func", reward_key="score")
    assert (right["reward"], right["acc"]) == (1.0, 1.0)
    wrong = bench.generate("retool.generate", bench.script(("add 1 1", "stop"), ("no", "stop")))
    (told,) = scores(bench, Group(1, wrong.prompt, [wrong]), path="retool.reward_func", reward_key="score")
    assert told["reward"] == pytest.approx(-1.0 + (1 - 2) / 2 * 0.1)


def test_nobody_rewards(bench, group):
    (error,) = scores(bench, group("a"))
    assert "the generate function set no `reward`" in str(error)


# ------------------------------------------------------------------------------------------------------------ filters


def rewarded(group, *rewards):
    for sample, reward in zip(group.samples, rewards, strict=True):
        sample.reward = reward
    return group


def test_filters_of_both_shapes(bench, group):
    verdict = bench.build("sample_filters", path="judges.disagreeing")(rewarded(group("a", "b"), 1.0, 1.0))
    assert (verdict.keep, verdict.reason) == (False, "all_1")
    assert bench.build("sample_filters", path="judges.any_right")(rewarded(group("a", "b"), 0.0, 1.0)).keep is True
    plain = bench.build("sample_filters", path="judges.any_right")(rewarded(group("a", "b"), 0.0, 0.0))
    assert (plain.keep, plain.reason) == (False, "filtered")


def test_upstreams_own_filter_sees_the_key(bench, configured, group):
    """`check_reward_nonzero_std` reads `reward[args.reward_key]`: rewards reach it as the function returned them."""
    configured("--custom-rm-path", "judges.as_mapping", "--reward-key", "score")
    path = "slime.rollout.filter_hub.dynamic_sampling_filters.check_reward_nonzero_std"
    check = bench.build("sample_filters", path=path)
    for texts, keep, reason in ((("yes", "no"), True, ""), (("no", "no"), False, "zero_std_-1.0")):
        made = group(*texts)
        for sample, told in zip(
            made.samples, scores(bench, made, path="judges.as_mapping", reward_key="score"), strict=True
        ):
            sample.reward = told["reward"]
        assert (check(made).keep, check(made).reason) == (keep, reason)


def test_failed_samples_are_not_shown_to_a_filter(bench, group):
    made = rewarded(group("a", "b", "c"), 0.0, 1.0, None)
    made.samples[2].status = Status.FAILED
    assert bench.build("sample_filters", path="judges.disagreeing")(made).keep
    for sample in made.samples:
        sample.status = Status.FAILED
    assert bench.build("sample_filters", path="judges.disagreeing")(made).reason == "all_failed"


def test_a_filter_that_returns_neither(bench, group):
    with pytest.raises(HookError, match="a DynamicFilterOutput or a bool is expected"):
        bench.build("sample_filters", path="judges.unsure")(rewarded(group("a"), 1.0))
