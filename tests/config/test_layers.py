"""Precedence, origins, task sets, presets, Python."""

import pytest

from miles.config.faults import ConfigFaults
from miles.config.load import plugin_wishes

BASE = """\
model: {hf_checkpoint: org/tiny}
rollout:
  num_rollout: 5
  batch_size: 16
algorithm:
  policy_loss:
    name: soft
    low: 0.4
data:
  sets:
    - {name: sums, path: sums.jsonl, reward: one}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


def test_later_layers_win_and_every_value_knows_its_origin(solve, write):
    base, over = write(BASE), write("rollout:\n  batch_size: 8\n", "over.yaml")
    done = solve((base, over), "--lr", "1e-4", "--rollout.n_samples_per_prompt=2", base=(), overrides={"seed": 9})
    config = done.config
    assert (config.rollout.batch_size, config.rollout.num_rollout, config.optimizer.lr) == (8, 5, 1e-4)
    assert (config.rollout.n_samples_per_prompt, config.run.seed) == (2, 9)
    assert str(done.origin("rollout.batch_size")) == f"{over}:2"
    assert str(done.origin("rollout.num_rollout")) == f"{base}:3"
    assert str(done.origin("algorithm.policy_loss.options.low")) == f"{base}:8"
    assert str(done.origin("optimizer.lr")) == "--lr"
    assert str(done.origin("run.seed")) == "seed, given in Python"
    assert str(done.origin("data.sets.sums.path")) == f"{base}:11"
    assert str(done.origin("train.micro_batch_size")) == "default"


def test_options_stay_with_their_component(solve, write):
    base = write(BASE)
    kept = solve((base, write("algorithm: {policy_loss: {high: 0.5}}", "o.yaml")), base=())
    assert kept.config.algorithm.policy_loss.name == "soft"
    assert kept.config.algorithm.policy_loss.options == {"low": 0.4, "high": 0.5}
    changed = solve((base,), "--policy-loss", "hard", base=())
    assert changed.config.algorithm.policy_loss.options == {}
    again = solve((base,), "--policy-loss", "soft", base=())
    assert again.config.algorithm.policy_loss.options == {"low": 0.4}


def test_options_without_a_name_belong_to_the_default(solve):
    spec = solve((), "--algorithm.policy_loss.eps=0.3").config.algorithm.policy_loss
    assert (spec.name, spec.options) == ("ppo_clip", {"eps": 0.3})


def test_task_sets_as_a_list_replace_and_as_a_mapping_merge(solve, write):
    base = write(BASE)
    merged = solve(
        (base, write("data: {sets: {sums: {weight: 2}, more: {path: m.jsonl, reward: one}}}", "m.yaml")), base=()
    )
    assert [(s.name, s.path, s.weight) for s in merged.config.data.sets] == [
        ("sums", "sums.jsonl", 2.0),
        ("more", "m.jsonl", 1.0),
    ]
    replaced = solve((base, write("data: {sets: [{name: only, path: o.jsonl, reward: one}]}", "r.yaml")), base=())
    assert [s.name for s in replaced.config.data.sets] == ["only"]


def test_flat_flags_fill_the_set_called_default_or_the_only_one(solve, write):
    base = write(BASE)
    only = solve((base,), "--rollout-temperature", "0.8", "--input-key", "q", base=()).config.data.sets
    assert [(s.name, s.sampling.temperature, s.keys.input) for s in only] == [("sums", 0.8, "q")]
    two = write("data: {sets: {default: {path: d.jsonl, reward: one}}}", "two.yaml")
    sets = solve((base, two), "--input-key", "q", base=()).config.data.sets
    assert [(s.name, s.keys.input) for s in sets] == [("sums", "input"), ("default", "q")]
    other = write("data: {sets: {other: {path: d.jsonl, reward: one}}}", "other.yaml")
    with pytest.raises(ConfigFaults, match=r"which task set.*sums, other(?s:.*)--data.sets.sums.keys.input="):
        solve((base, other), "--input-key", "q", base=())


def test_a_star_is_every_set(solve, write):
    base = write(BASE)
    two = write("data: {sets: {more: {path: m.jsonl, reward: one}}}", "two.yaml")
    sets = solve((base, two), "--data.sets.*.sampling.temperature=0.5", base=()).config.data.sets
    assert [s.sampling.temperature for s in sets] == [0.5, 0.5]
    rewards = {"data.sets.*.reward": "two", "eval.sets.*.reward": "two"}
    config = solve((base, two), base=(), overrides=rewards).config
    assert [s.reward[0].name for s in config.data.sets] == ["two", "two"]
    assert config.eval.sets == ()


def test_sets_by_name_or_number(solve, write):
    base = write(BASE)
    config = solve((base,), "--data.sets.0.weight=3", "--data.sets.sums.sampling.max_new_tokens=9", base=()).config
    assert (config.data.sets[0].weight, config.data.sets[0].sampling.max_new_tokens) == (3.0, 9)
    with pytest.raises(ConfigFaults, match="did you mean sums"):
        solve((base,), "--data.sets.sum.weight=3", base=())


def test_evaluation_by_flags(solve):
    done = solve(
        (), "--input-key", "q", "--rollout-temperature", "0.9", "--eval-prompt-data", "a", "a.jsonl", "b", "b.jsonl",
        "--eval-temperature", "0", "--n-samples-per-eval-prompt", "4",
    )  # fmt: skip
    a, b = done.config.eval.sets
    assert (a.name, a.path, b.name, b.path) == ("a", "a.jsonl", "b", "b.jsonl")
    assert (a.sampling.temperature, a.n_samples_per_prompt) == (0.0, 4)
    assert (a.keys.input, a.reward[0].name) == ("q", "one")
    assert str(done.origin("eval.sets.a.keys.input")) == "as data.sets.default"
    assert done.config.data.sets[0].sampling.temperature == 0.9
    with pytest.raises(ConfigFaults, match="there is no evaluation set"):
        solve((), "--eval-temperature", "0")
    with pytest.raises(ConfigFaults, match="pairs"):
        solve((), "--eval-prompt-data", "a.jsonl")


def test_evaluation_sets_of_a_file_stand_alone(solve, write):
    file = write("eval: {sets: [{name: held_out, path: h.jsonl, reward: two}]}")
    held_out = solve((file,), "--input-key", "q").config.eval.sets[0]
    assert (held_out.keys.input, held_out.reward[0].name) == ("input", "two")


def test_a_preset_lies_under_what_stands_beside_it(solve, write):
    file = write("rollout: {batch_size: 9}\nalgorithm: {preset: recipe}")
    done = solve((file,), "--kl-loss-coef", "0.01")
    algorithm = done.config.algorithm
    assert (algorithm.advantage_estimator.name, algorithm.policy_loss.options) == ("steep", {"low": 0.1, "high": 0.3})
    assert (algorithm.kl_loss_coef, done.config.rollout.batch_size) == (0.01, 9)
    assert str(done.origin("algorithm.policy_loss.options.high")).startswith("preset 'recipe' of")
    assert done.config.algorithm.preset == "recipe"


def test_a_preset_lies_right_below_the_layer_that_names_it(solve, write):
    said = "algorithm: {policy_loss: {name: hard, low: 0.7}"
    asks = write(f"{said}, preset: recipe}}", name="asks.yaml")
    plain = write(f"{said}}}", name="plain.yaml")
    assert solve((asks,)).config.algorithm.policy_loss.name == "hard"
    for words in (["--preset", "recipe"], ["--advantage-estimator", "recipe"]):
        assert solve((plain,), *words).config.algorithm.policy_loss.name == "soft"
        assert solve((plain,), *words, "--policy-loss", "hard").config.algorithm.policy_loss.name == "hard"
    assert solve((plain,), overrides={"preset": "recipe"}).config.algorithm.policy_loss.name == "soft"
    assert solve((plain, asks)).config.algorithm.policy_loss.name == "hard"
    assert solve((asks, write("run: {name: x}", name="last.yaml"))).config.algorithm.policy_loss.name == "hard"


def test_an_estimator_that_is_only_a_preset_stands_for_it(solve, write):
    config = solve((), "--advantage-estimator", "recipe").config
    assert config.algorithm.advantage_estimator.name == "steep"
    assert config.algorithm.preset == "recipe"
    options = solve((write("algorithm: {advantage_estimator: {name: recipe, low: 0.9}}"),)).config
    assert options.algorithm.advantage_estimator.options == {"low": 0.9}
    assert (
        solve((), "--preset", "recipe", "--advantage-estimator", "flat").config.algorithm.advantage_estimator.name
        == "flat"
    )
    with pytest.raises(ConfigFaults, match=r"is a preset, but algorithm\.preset is 'typo'"):
        solve((), "--advantage-estimator", "recipe", "--preset", "typo")


def test_faults_of_presets_name_them(solve):
    with pytest.raises(ConfigFaults, match=r"kl_los_coef.*preset 'typo'(?s:.*)did you mean algorithm.kl_loss_coef"):
        solve((), "--preset", "typo")
    with pytest.raises(ConfigFaults, match="'recip'(?s:.*)did you mean 'recipe'"):
        solve((), "--preset", "recip")


def test_overrides_from_python(solve):
    def judge(sample):
        return 1.0

    done = solve(
        (),
        overrides={
            "rollout.batch_size": 4,
            "optimizer": {"lr": 0.5},
            "reward": judge,
            "policy_loss": "soft",
            "loss_low": 0.6,
        },
    )
    config = done.config
    assert (config.rollout.batch_size, config.optimizer.lr) == (4, 0.5)
    assert config.algorithm.policy_loss.options == {"low": 0.6}
    assert done.registry.build("rewards", config.data.sets[0].reward[0]) is judge
    weighted = solve((), overrides={"data.sets.default.reward": [judge, "two"]})
    assert [r.name for r in weighted.config.data.sets[0].reward][1] == "two"
    with pytest.raises(ConfigFaults, match="did you mean"):
        solve((), overrides={"rollout_batchsize": 3})


def test_mappings_instead_of_files(solve):
    done = solve(({"rollout": {"num_rollout": 2}, "data": {"sets": [{"path": "x", "reward": "one"}]}},))
    assert done.config.rollout.num_rollout == 3  # the command line is above
    assert done.config.data.sets[0].name == "default"


def test_what_plugins_are_wished_for_is_known_before_they_load(write):
    file = write("plugins: {block: [a], require: ['miles-x>=1']}")
    assert plugin_wishes([file], ["--lr", "1"]) == (["a"], ["miles-x>=1"])
    assert plugin_wishes([], ["--plugins-block", "b,c", "--plugins-require=miles-y", "--lr", "1"]) == (
        ["b", "c"],
        ["miles-y"],
    )


def test_the_dumped_configuration_resolves_to_itself(solve, write):
    import yaml

    first = solve(
        (), "--preset", "recipe", "--rollout-filters", "sieve", "--environment", "maze", "--tracking", "jsonl"
    ).config
    again = solve((write(yaml.safe_dump(first.model_dump(mode="json"))),), base=()).config
    assert again == first
