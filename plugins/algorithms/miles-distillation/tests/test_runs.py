"""Whole runs in miniature: teachers of a few thousand parameters in the trainer, on servers, or the policy itself."""

import json

import pytest

import miles
from miles.api import ConfigError, EngineError
from miles.testing import tiny
from miles.toolkit import per_token

STUDENT, TEACHER, OTHER = 0, 1, 2
METHODS = {
    "distillation": {"advantage_estimator": "distillation", "policy_loss": "ppo_clip"},
    "distill_full": {"advantage_estimator": "none", "policy_loss": "distill_full"},
    "distill_topk": {"advantage_estimator": "none", "policy_loss": {"name": "distill_topk", "k": 8}},
}
METRIC = {
    "distillation": "train/distill_sampled_kl",
    "distill_full": "train/distill_reverse",
    "distill_topk": "train/distill_reverse",
}


def folder(seed):
    return str(tiny.saved("qwen3", seed))


@pytest.fixture
def distil(tmp_path):
    """`distil(method, teacher section, metadata of rows, ...)`: a short run; its metrics, step by step."""

    def run(algorithm, teacher, metadata=lambda i: {}, steps=1, lr=3e-3, ranks=1, **default_set):
        rows = [{"input": f"{i} and {i}", "metadata": metadata(i)} for i in range(8)]
        data = tmp_path / "prompts.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        count = len(list(tmp_path.glob("run-*")))
        directory = tmp_path / f"run-{count}"
        sampling = {"max_new_tokens": 8, "temperature": default_set.pop("temperature", 1.0)}
        miles.train(
            {
                "run": {"dir": str(directory), "num_threads": 1, "report": False},
                "model": {"hf_checkpoint": folder(STUDENT)},
                "data": {"sets": [{"name": "default", "path": str(data), "sampling": sampling, **default_set}]},
                "rollout": {"num_rollout": steps, "batch_size": 4, "n_samples_per_prompt": 4},
                "algorithm": algorithm,
                "teacher": teacher,
                "optimizer": {"lr": lr},
                "train": {"max_tokens_per_gpu": 64},
                "resources": {"executor": "local", "actor_num_gpus_per_node": ranks} if ranks > 1 else {},
            }
        )
        lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line["step"]]

    return run


@pytest.fixture
def teacher_server(server):
    """The small server, with the weights of one of the tiny checkpoints."""

    def of(seed):
        server.lm = tiny.model(tiny.hf_config("qwen3"), seed)
        return server.url

    return of


def assert_same(one, other, names):
    for a, b in zip(one, other, strict=True):
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_a_student_comes_nearer_to_its_teacher_and_no_reward_is_needed(distil, method):
    pace = {"steps": 10, "lr": 3e-3} if method == "distillation" else {"steps": 4, "lr": 3e-2}  # one draw is noisier
    divergences = [line[METRIC[method]] for line in distil(METHODS[method], {"load": folder(TEACHER)}, **pace)]
    assert sum(divergences[-2:]) < 0.75 * sum(divergences[:2])


@pytest.mark.parametrize("method", ["distillation", "distill_topk"])
def test_a_server_teaches_what_the_same_model_in_the_trainer_does(distil, teacher_server, server, method):
    local = distil(METHODS[method], {"load": folder(TEACHER)})
    remote = distil(METHODS[method], {"urls": teacher_server(TEACHER)})
    assert_same(local, remote, (METRIC[method], "train/loss", "train/grad_norm"))
    asked = [body for path, body in server.calls if path == "/generate"]
    assert len(asked) == 16
    assert {body["top_logprobs_num"] for body in asked} == {8 if method == "distill_topk" else 0}


def odd_one_out(i):
    """Metadata: every other prompt is the other teacher's."""
    return {"opd_teacher": "odd"} if i % 2 else {}


@pytest.mark.slow
def test_each_prompt_has_its_own_teacher(distil, teacher_server):
    term = METHODS["distillation"]
    both_local = distil(term, {"load": {"default": folder(TEACHER), "odd": folder(OTHER)}}, odd_one_out)
    one_remote = distil(term, {"load": folder(TEACHER), "urls": {"odd": teacher_server(OTHER)}}, odd_one_out)
    assert_same(both_local, one_remote, ("train/distill_sampled_kl", "train/loss", "train/grad_norm"))


@pytest.mark.slow
def test_of_prompts_that_the_policy_teaches_itself_there_is_nothing_to_learn(distil):
    full = METHODS["distill_full"]
    one = distil(full, {"load": {"default": folder(TEACHER), "odd": "policy"}}, odd_one_out)
    other = distil(full, {"load": {"default": "policy", "odd": folder(TEACHER)}}, odd_one_out)
    whole = distil(full, {"load": folder(TEACHER)})
    # half of the tokens each, so that the two means lie on either side of half of the whole's
    halves = [lines[0]["train/distill_reverse"] for lines in (one, other)]
    assert min(halves) > 0
    assert sum(halves) == pytest.approx(whole[0]["train/distill_reverse"], rel=1e-4)


def test_two_ranks_learn_what_one_does(distil):
    """From a teacher of their own and from the policy itself, by whole vocabularies; some micro-batches have samples of
    one of the two alone."""
    load = {"default": folder(TEACHER), "odd": "policy"}
    one, two = (distil(METHODS["distill_full"], {"load": load}, odd_one_out, steps=2, ranks=r) for r in (1, 2))
    # Adam makes steps of one size out of gradients that are all but zero: after the first, rounding is no longer small
    for first, second, tolerance in zip(one, two, (1e-5, 1e-3), strict=True):
        for name in ("train/distill_reverse", "train/loss", "train/grad_norm"):
            assert second[name] == pytest.approx(first[name], rel=tolerance)
            assert first[name] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_is_told_nothing_new_has_nothing_to_learn(distil, method):
    lines = distil(METHODS[method], {"load": "policy", "prompt_key": "hint"}, lambda i: {"hint": f"{i} and {i}"})
    assert lines[0][METRIC[method]] == pytest.approx(0, abs=1e-5)
    assert lines[0]["train/grad_norm"] == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_policy_that_is_told_more_teaches_itself(distil, method):
    def told(i):
        return {"hint": f"a longer story: {i} and {i}"}

    section = {"load": "policy", "prompt_key": "hint"}
    divergences = [line[METRIC[method]] for line in distil(METHODS[method], section, told, steps=8, lr=1e-2)]
    assert divergences[0] > 0.05
    assert sum(divergences[-2:]) < 0.8 * sum(divergences[:2])


def rewards_as_they_are(inputs):
    return per_token(inputs.rewards_N, inputs)


def test_as_a_term_it_is_added_to_an_estimator(distil):
    def words(sample):
        return float(len(set(sample.text)))

    terms = [{"name": "distillation", "coef": 0.5}]
    algorithm = {"advantage_estimator": rewards_as_they_are, "advantage_terms": terms}
    section = {"load": folder(TEACHER)}
    with_term = distil(algorithm, section, reward=words)
    assert with_term[0]["train/distill_sampled_kl"] > 0
    with pytest.raises(ConfigError, match="nothing judges the responses"):
        distil(algorithm, section)


def test_a_loss_that_looks_at_no_advantages_wants_no_estimator(distil):
    algorithm = {"advantage_estimator": "grpo", "policy_loss": "miles-distillation/distill_full"}
    with pytest.raises(ConfigError, match="'miles-distillation/distill_full' looks at no advantages"):
        distil(algorithm, {"load": folder(TEACHER)}, reward=lambda sample: 0.0)


def test_the_same_opinion_does_not_count_twice(distil):
    algorithm = {"advantage_estimator": "distillation", "advantage_terms": ["miles-distillation/distillation"]}
    with pytest.raises(ConfigError, match="it counts twice"):
        distil(algorithm, {"load": folder(TEACHER)})


def test_a_support_that_a_server_does_not_report_is_refused_at_once(distil):
    algorithm = {"advantage_estimator": "none", "policy_loss": {"name": "distill_topk", "support": "only-student"}}
    with pytest.raises(ConfigError, match="support 'student' needs the teacher's opinion"):
        distil(algorithm, {"urls": "http://127.0.0.1:9"})


@pytest.mark.slow
def test_the_temperature_of_the_rollout_is_the_teachers(distil, teacher_server, server):
    term = METHODS["distillation"]
    local = distil(term, {"load": folder(TEACHER)}, temperature=0.7)
    with pytest.raises(EngineError, match="rollout's is 0.7"):
        distil(term, {"urls": teacher_server(TEACHER)}, temperature=0.7)
    server.scales = True
    assert_same(local, distil(term, {"urls": server.url}, temperature=0.7), ("train/distill_sampled_kl",))


def test_a_server_that_is_not_there_is_found_before_the_first_rollout(distil):
    engine = {"name": "scoring_server", "start_timeout": 0.1}
    with pytest.raises(EngineError, match=r"127.0.0.1:9 is not ready"):
        distil(METHODS["distillation"], {"urls": "http://127.0.0.1:9", "engine": engine})
