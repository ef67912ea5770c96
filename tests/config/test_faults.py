"""Everything that is wrong, in one report, with key, value, origin and remedy."""

import re

import pytest

from miles.config.faults import ConfigFaults

SUPERVISED = ["--advantage-estimator", "none", "--policy-loss", "unjudging"]


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return str(path)

    return write


def faults_of(solve, *arguments, files=(), **more):
    with pytest.raises(ConfigFaults) as caught:
        solve(files, *arguments, **more)
    assert caught.value.exit_code == 2
    return {fault.key: fault for fault in caught.value.faults}


def test_one_report_for_everything(solve, write):
    file = write(
        "rollout:\n  batch_sice: 4\n  num_rollout: many\nalgorithm:\n  policy_loss: {name: soft, lo: 1}\n"
        "  advantage_estimator: flatt\nlogging: {a: 1}\noptimizer:\n  lr: -1\n"
    )
    faults = faults_of(solve, "--colocatte", "--kl-loss-type", "k9", files=(file,), base=())
    assert set(faults) == {
        "rollout.batch_sice",
        "rollout.num_rollout",
        "algorithm.policy_loss.lo",
        "algorithm.advantage_estimator",
        "logging",
        "optimizer.lr",
        "--colocatte",
        "algorithm.kl_type",
    }
    assert str(faults["rollout.num_rollout"].origin) == f"{file}:3"
    assert "integer" in faults["rollout.num_rollout"].problem
    assert faults["rollout.batch_sice"].remedy == "did you mean rollout.batch_size?"
    assert "did you mean 'low'" in faults["algorithm.policy_loss.lo"].problem
    assert str(faults["algorithm.policy_loss.lo"].origin) == f"{file}:5"
    assert "did you mean 'flat'" in faults["algorithm.advantage_estimator"].problem
    assert str(faults["algorithm.kl_type"].origin) == "--kl-loss-type"
    assert "'k1', 'k2', 'k3' or 'low_var_kl'" in faults["algorithm.kl_type"].problem


def test_an_option_that_must_be_given_names_its_flag(solve):
    faults = faults_of(solve, "--is-correction", "bounded")
    assert set(faults) == {"algorithm.is_correction.most", "algorithm.is_correction.least"}
    assert {fault.problem for fault in faults.values()} == {"IS correction 'bounded': must be given"}
    assert faults["algorithm.is_correction.most"].remedy == "--bounded-most"
    assert faults["algorithm.is_correction.least"].remedy == ""
    solve((), "--is-correction", "bounded", "--bounded-most", "2", "--algorithm.is_correction.least=1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "run.yaml:1"),
        ("- 1", "mapping of sections"),
        ("rollout:\n  [a, b]: 1\n", "run.yaml:2(?s:.*)key"),
        ("rollout:\n  batch_size: 1\n  batch_size: 2\n", "run.yaml:3(?s:.*)line 2"),
        ("rollout: 3", "is a section"),
        ("data: {sets: 3}", "must be a list of task sets"),
        ("data: {sets: [{name: a}, {name: a}]}", "two task sets have this name"),
        ("data: {sets: [words]}", "a task set is a mapping"),
        ("hf_checkpoint: x", "did you mean model.hf_checkpoint"),
        ("rollout: {lr: 1}", "did you mean optimizer.lr"),
        ("rollout: {engine: 3}", "rollout.engine"),
    ],
)
def test_malformed_files(solve, write, text, words):
    with pytest.raises(ConfigFaults, match=words):
        solve((write(text),))


def test_a_file_that_is_not_there(solve):
    with pytest.raises(ConfigFaults, match=r"nowhere\.yaml cannot be read"):
        solve(("nowhere.yaml",))


def test_numbers_in_scientific_notation_are_numbers(solve, write):
    assert solve(
        (write("algorithm: {policy_loss: {name: soft, low: 1e-3}}"),)
    ).config.algorithm.policy_loss.options == {"low": 0.001}


def test_what_is_missing(solve):
    assert set(faults_of(solve, base=())) == {"model.hf_checkpoint", "data.sets", "rollout.num_rollout"}
    assert set(faults_of(solve, base=(), purpose="eval")) == {"model.hf_checkpoint", "eval.sets"}
    solve(base=(), purpose="show")
    no_reward = ("--hf-checkpoint", "org/x", "--num-rollout", "1", "--prompt-data", "x.jsonl")
    assert set(faults_of(solve, base=no_reward)) == {"data.sets.default.reward"}
    solve((), "--rollout-engine", "none", base=no_reward)
    solve((), "--generate", "single_turn", base=no_reward)


@pytest.mark.parametrize(
    ("algorithm", "enough"),
    [
        (["--advantage-estimator", "unpaid"], True),
        (["--advantage-estimator", "unpaid", "--policy-loss", "soft"], True),
        (["--advantage-estimator", "unpaid", "--advantage-terms", "pull"], False),
        (["--advantage-estimator", "flat", "--advantage-terms", "unpaid"], False),
        (["--advantage-estimator", "none", "--policy-loss", "unjudging"], True),
        (["--advantage-estimator", "none", "--policy-loss", "soft"], False),
        (["--advantage-estimator", "flat", "--policy-loss", "unjudging"], False),
    ],
)
def test_training_needs_no_reward_that_nothing_looks_at(solve, algorithm, enough):
    base = ("--hf-checkpoint", "org/x", "--num-rollout", "1", "--prompt-data", "x.jsonl")
    if enough:
        solve((), *algorithm, base=base)
    else:
        assert "data.sets.default.reward" in faults_of(solve, *algorithm, base=base)
    evaluated = [*algorithm, "--eval-prompt-data", "a", "a.jsonl"]
    assert "eval.sets.a.reward" in faults_of(solve, *evaluated, base=base)


@pytest.mark.parametrize(
    ("arguments", "key", "words"),
    [
        (["--kl-coef", "0.1", "--kl-loss-coef", "0.1"], "algorithm.kl_coef", "twice"),
        (["--use-unbiased-kl"], "algorithm.unbiased_kl", "kl_loss_coef is 0"),
        (["--rollout-top-p", "0.9"], "data.sets.default.sampling.top_p", "policy that acted"),
        (["--rollout-top-k", "50"], "data.sets.default.sampling.top_k", "policy that acted"),
        (["--rollout-min-p", "0.1"], "data.sets.default.sampling.min_p", "policy that acted"),
        (["--rollout-min-response-len", "4"], "data.sets.default.sampling.min_new_tokens", "policy that acted"),
        (["--rollout-temperature", "0"], "data.sets.default.sampling.temperature", "greedy"),
        (["--rollout-mode", "one_step_off", "--rollout-engine", "none"], "rollout.mode", "nothing is generated"),
        (["--rollout-mode", "one_step_off", "--partial-rollout"], "rollout.partial_rollout", "no rollout is interrupt"),
        (
            ["--mask-offpolicy-in-partial-rollout"],
            "rollout.mask_offpolicy_in_partial_rollout",
            "there are no partial rollouts",
        ),
        (["--max-weight-staleness", "2"], "rollout.max_weight_staleness", "nothing grows old"),
        (
            ["--rollout-mode", "fully_async", "--update-weights-interval", "3"],
            "weight_sync.interval",
            "older than --max-weight-staleness allows (1), and nothing",
        ),
        (
            ["--partial-rollout", "--max-weight-staleness", "0", "--update-weights-interval", "2"],
            "weight_sync.interval",
            "older than --max-weight-staleness allows (0), and nothing",
        ),
        (["--partial-rollout", "--deterministic-mode"], "run.deterministic", "depends on time"),
        (["--rollout-mode", "fully_async", "--colocate"], "resources.colocate", "take turns"),
        (["--rollout-mode", "fully_async", "--deterministic-mode"], "run.deterministic", "cannot be promised"),
        (["--update-weights-interval", "4", "--deterministic-mode"], "run.deterministic", "weight_sync.interval=4"),
        (["--loss-aggregation-constant", "512"], "algorithm.aggregation_constant", "sample_mean"),
        (
            ["--eval-prompt-data", "a", "a.jsonl", "--eval.sets.a.sampling.min_new_tokens=999"],
            "eval.sets.a.sampling.min_new_tokens",
            "max_new_tokens=256",
        ),
        (["--rollout-max-context-len", "100"], "data.sets.default.sampling.max_new_tokens", "no room"),
        (["--min-lr", "1", "--lr-decay-style", "cosine"], "optimizer.min_lr", "peak"),
        (
            ["--advantage-estimator", "valued", "--critic-min-lr", "1", "--critic-lr-decay-style", "cosine"],
            "critic.min_lr",
            "peak",
        ),
        ([*SUPERVISED, "--advantage-terms", "flat"], "algorithm.advantage_terms", "there are none"),
        ([*SUPERVISED, "--normalize-advantages"], "algorithm.normalize_advantages", "there are none"),
        ([*SUPERVISED, "--kl-coef", "0.1"], "algorithm.kl_coef", "there are none"),
        (["--advantage-estimator", "none"], "algorithm.policy_loss", "policy loss 'ppo_clip' needs advantages"),
        (["--policy-loss", "sft"], "algorithm.advantage_estimator", "'sft' looks at no advantages"),
        (["--lr-warmup-iters", "9", "--lr-decay-iters", "5"], "optimizer.lr_decay_steps", "warm-up"),
        (["--eval-interval", "5"], "eval.interval", "nothing to evaluate"),
        (["--eval-prompt-data", "a", "a.jsonl", "--eval-pass-k", "8"], "eval.pass_k", "1 at most"),
        (["--rm-type", "world"], "data.sets.default.reward", "needs an environment"),
        (["--generate", "multi_turn"], "data.sets.default.generate", "needs an environment"),
        (["--critic-lr", "1e-5"], "critic.lr", "no chosen component needs a critic"),
        (
            ["--advantage-estimator", "valued", "--num-critic-only-steps", "5", "--num-rollout", "5"],
            "critic.only_steps",
            "leaves the policy nothing to learn from",
        ),
        (["--advantage-terms", "flat", "taught"], "teacher.load", "who teaches?"),
        (["--opd-teacher-load", "t"], "teacher.load", "no chosen component needs a teacher"),
        (["--advantage-terms", "taught", "--opd-teacher-load", "policy"], "teacher.load", "agrees with itself"),
        (
            ["--advantage-terms", "taught", "--opd-teacher-load", "a=x", "--opd-teacher-urls", "a=http://y"],
            "teacher.urls",
            "'a' is also in teacher.load",
        ),
        (["--policy-loss", "copying", "--opd-teacher-urls", "http://y:1"], "teacher.urls", "which no server sends"),
        (
            ["--policy-loss", "copying", "--context-parallel-size", "2", "--actor-num-gpus-per-node", "2"],
            "train.context_parallel_size",
            "policy loss 'copying' needs the logits of whole samples",
        ),
        (
            ["--context-parallel-size", "2", "--reproducible-ranks", "2", "--actor-num-gpus-per-node", "2"],
            "train.context_parallel_size",
            "add up in another order",
        ),
        (
            ["--policy-loss", "picking", "--opd-teacher-load", "a=x", "--opd-teacher-urls", "b=http://y"],
            "teacher.urls",
            "cannot compare with both",
        ),
        (
            ["--advantage-terms", "taught", "--opd-teacher-load", "x", "--opd-teacher-engine", "torch"],
            "teacher.engine",
            "no server to speak to",
        ),
        (
            ["--advantage-estimator", "greedy", "--rollout-engine", "none"],
            "algorithm.advantage_estimator",
            "a greedy rollout of each prompt, but the engine 'none' generates nothing",
        ),
        (["--reward-terms", "world"], "data.reward_terms.0", "needs an environment"),
        (["--rollout-filters", "by_experts"], "rollout.filters.0", "expert choices of the rollout, which is not"),
        (["--routing-replay", "replay"], "moe.routing_replay", "not in this version"),
        (
            ["--advantage-estimator", "compared", "--rollout-engine", "none"],
            "algorithm.advantage_estimator",
            "'none' generates nothing",
        ),
        (["--global-batch-size", "7"], "train.global_batch_size", "does not divide"),
        (["--num-steps-per-rollout", "7"], "train.num_steps_per_rollout", "does not divide"),
    ],
)
def test_contradictions(solve, arguments, key, words):
    faults = faults_of(solve, *arguments)
    assert words in faults[key].problem
    assert faults[key].remedy


def test_who_would_need_an_idle_model_is_named(solve):
    faults = faults_of(solve, "--critic-lr", "1e-5", "--opd-teacher-load", "t")
    assert re.search(r"choose one that does \(.*\bvalued\b.*\), or leave it out", faults["critic.lr"].remedy)
    assert re.search(r"choose one that does \(.*\bcopying\b.*\btaught\b.*\)", faults["teacher.load"].remedy)


def test_evaluation_may_do_what_training_may_not(solve):
    flags = [
        "--eval-prompt-data",
        "a",
        "a.jsonl",
        "--eval-top-p",
        "0.9",
        "--eval-temperature",
        "0",
        "--eval-top-k",
        "5",
        "--eval.sets.a.sampling.min_new_tokens=4",
    ]
    sampling = solve((), *flags).config.eval.sets[0].sampling
    assert (sampling.top_k, sampling.min_new_tokens) == (5, 4)


@pytest.mark.parametrize("name", ["compared", "greedy"])
def test_needs_that_are_met_are_no_fault(solve, name):
    assert solve((), "--advantage-estimator", name).config.algorithm.advantage_estimator.name == name


def test_terms_of_the_reward_have_the_shape_of_a_reward(solve):
    data = solve((), "--reward-terms", "{two: -0.5}", "--data.reward_terms.0.options.low=0.1").config.data
    assert [(r.name, r.weight, r.options) for r in data.reward_terms] == [("two", -0.5, {"low": 0.1})]
    assert [r.name for r in data.sets[0].reward] == ["one"]
    faults = faults_of(solve, "--reward-terms", "{name: two, lo: 1}")
    assert "did you mean 'low'" in faults["data.reward_terms.0.lo"].problem


def test_terms_alone_judge_nothing(solve):
    no_reward = ("--hf-checkpoint", "org/x", "--num-rollout", "1", "--prompt-data", "x.jsonl")
    assert set(faults_of(solve, "--reward-terms", "one", base=no_reward)) == {"data.sets.default.reward"}


def test_temperatures_of_training_sets_agree(solve):
    sets = {"a": {"path": "a", "reward": "one"}, "b": {"path": "b", "reward": "one", "sampling": {"temperature": 0.5}}}
    with pytest.raises(ConfigFaults, match="temperatures differ"):
        solve(({"data": {"sets": sets}},), base=("--hf-checkpoint", "org/x", "--num-rollout", "1"))


def test_a_correction_of_equal_numbers_is_refused(solve, plugins):
    with pytest.raises(ConfigFaults, match="same numbers"):
        solve((), "--old-logprobs", "rollout", "--is-correction", "json:dumps")


def test_an_environment_answers_those_who_need_one(solve):
    arguments = ("--rm-type", "world", "--environment", "{name: maze, low: 2}", "--reward-terms", "world")
    config = solve((), *arguments).config
    assert config.data.sets[0].environment.options == {"low": 2}


def test_wishes_about_plugins_come_before_plugins_are_loaded(solve):
    faults = faults_of(solve, "--plugins-block", "wandb", "--plugins-require", "miles>=0")
    assert set(faults) == {"plugins.block", "plugins.require"}
    assert "wandb" in faults["plugins.block"].problem


def test_what_a_setting_means_is_no_remedy(solve):
    fault = faults_of(solve, "--lr", "abc")["optimizer.lr"]
    assert (fault.meaning, fault.remedy) == ("Peak learning rate.", "")
    assert "meaning: Peak learning rate." in str(fault)
    assert "fix:" not in str(fault)


def test_batches_that_do_not_divide_are_told_which_would(solve):
    fault = faults_of(solve, "--rollout-batch-size", "6", "--n-samples-per-prompt", "4", "--global-batch-size", "7")[
        "train.global_batch_size"
    ]
    assert (fault.value, str(fault.origin), fault.remedy) == (7, "--global-batch-size", "give 4, 6, 8 or 12")


def test_a_reward_of_the_wrong_type(solve):
    faults = faults_of(solve, overrides={"data.sets.*.reward": 3})
    assert "a function, a name, a mapping from names to weights" in faults["data.sets.default.reward"].problem


def test_objects_that_workers_cannot_find(solve, tmp_path, monkeypatch):
    (tmp_path / "losses_of_mine.py").write_text(
        "class Loss:\n    def __init__(self, scale=1.0):\n        self.scale = scale\n"
        "    def __call__(self, inputs):\n        return inputs\n\n"
        "def make():\n    return lambda inputs: inputs\n\n"
        "def plain(inputs):\n    return inputs\n\n"
        "def reward(sample):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import losses_of_mine as mine

    def of_script(inputs):
        return inputs

    of_script.__module__, of_script.__qualname__ = "__main__", "of_script"
    monkeypatch.setattr("__main__.of_script", of_script, raising=False)
    several = ("--actor-num-gpus-per-node", "2")
    for loss in (mine.Loss(2.0), mine.make(), of_script):
        solve(overrides={"policy_loss": loss})
        fault = faults_of(solve, *several, overrides={"policy_loss": loss})["algorithm.policy_loss"]
        assert "by its name alone" in fault.problem
    for loss in (mine.Loss, mine.plain):
        solve((), *several, overrides={"policy_loss": loss, "reward": lambda sample: 1.0})


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("rollout: {engine: {name: torch, options: 3, max_len: 2}}\n", "rollout.engine.options"),
        ("rollout: {engine: {options: x}}\n", "rollout.engine.options"),
        ("rollout: {filters: [{name: both, options: x, k: 1}]}\n", "rollout.filters.0.options"),
        ("data: {reward_terms: {name: length, options: [1]}}\n", "data.reward_terms.0.options"),
        ("teacher: {load: 3}\n", "teacher.load"),
    ],
)
def test_what_is_no_mapping_is_named_with_its_line(solve, write, text, key):
    fault = faults_of(solve, files=(write(text),))[key]
    assert re.search("mapping|dictionary", fault.problem)
    assert str(fault.origin).endswith("run.yaml:1")


def test_a_task_set_may_have_a_point_in_its_name(solve):
    files = ({"data": {"sets": {"v1.5": {"reward": "one"}}}},)
    assert set(faults_of(solve, files=files, base=("--hf-checkpoint", "org/tiny", "--num-rollout", "3"))) == {
        "data.sets.v1.5.path"
    }
