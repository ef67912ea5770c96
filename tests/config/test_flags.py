"""One flag a leaf, under the names that users of slime and Miles know; switches, lists, flags of components."""

import pytest

from miles.config.faults import ConfigFaults
from miles.config.leaves import EVAL_FLAGS, flag_table, leaves


def test_every_leaf_has_one_canonical_flag_and_no_two_share_one():
    own = [leaf for leaf in leaves().values() if leaf.path[0] != "eval" or "*" not in leaf.path]
    without = {leaf.dotted for leaf in own if not leaf.flags}
    assert without == {"data.sets.*.name", "data.sets.*.n_samples_per_prompt"}
    spelt = [flag for leaf in own for flag in leaf.flags] + list(EVAL_FLAGS)
    assert len(spelt) == len(set(spelt)) == len(flag_table())
    assert all(flag.startswith("--") and flag == flag.lower() and "_" not in flag for flag in spelt)


def test_every_leaf_has_help():
    assert [leaf.dotted for leaf in leaves().values() if not leaf.help] == []


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--hf-checkpoint", "model.hf_checkpoint"),
        ("--train-backend", "train.train_backend"),
        ("--advantage-estimator", "algorithm.advantage_estimator"),
        ("--rollout-batch-size", "rollout.batch_size"),
        ("--n-samples-per-prompt", "rollout.n_samples_per_prompt"),
        ("--global-batch-size", "train.global_batch_size"),
        ("--use-dynamic-batch-size", "train.use_dynamic_batch_size"),
        ("--max-tokens-per-gpu", "train.max_tokens_per_gpu"),
        ("--gradient-checkpointing", "train.gradient_checkpointing"),
        ("--colocate", "resources.colocate"),
        ("--prompt-data", "data.sets.*.path"),
        ("--eval-temperature", "eval.sets.*.sampling.temperature"),
    ],
)
def test_flags_have_the_names_that_slime_and_miles_users_know(flag, key):
    assert flag_table()[flag].dotted == key


def test_switches(solve):
    assert solve((), "--colocate").config.resources.colocate is True
    assert solve((), "--no-use-dynamic-batch-size").config.train.use_dynamic_batch_size is False
    assert solve((), "--rollout-shuffle", "--colocate=true").config.data.shuffle is True
    assert solve((), "--use-dynamic-batch-size", "false", "--colocate").config.train.use_dynamic_batch_size is False
    assert solve((), "--offload-train", "--no-offload-train").config.resources.offload_train is False


def test_lists_and_mappings(solve):
    config = solve((), "--rollout-stop", "a,b", ";", "--rollout-stop-token-ids", "1,2").config
    assert config.data.sets[0].sampling.stop == ("a,b", ";")
    assert config.data.sets[0].sampling.stop_token_ids == (1, 2)
    assert solve((), "--eval-pass-k", "[1, 4]", base=(), purpose="show").config.eval.pass_k == (1, 4)
    kwargs = solve((), "--apply-chat-template-kwargs", '{"enable_thinking": false}').config.data.chat_template_kwargs
    assert kwargs == {"enable_thinking": False}
    assert solve((), "--apply-chat-template-kwargs", "a=1,b=x").config.data.chat_template_kwargs == {"a": 1, "b": "x"}
    assert solve((), "--save-interval", "none").config.checkpoint.interval is None


def test_components_on_the_command_line(solve):
    config = solve(
        (), "--policy-loss", "{name: soft, low: 0.4}", "--rollout-filters", "sieve", "--tracking", "jsonl"
    ).config
    assert config.algorithm.policy_loss.options == {"low": 0.4}
    assert [spec.name for spec in config.rollout.filters] == ["sieve"]
    rewards = solve((), "--rm-type", "one=1.0,two=0.5").config.data.sets[0].reward
    assert [(r.name, r.weight) for r in rewards] == [("one", 1.0), ("two", 0.5)]
    assert [r.name for r in solve((), "--reward", "one", "two").config.data.sets[0].reward] == ["one", "two"]


def test_options_by_dotted_path_get_their_types(solve):
    config = solve(
        (),
        "--policy-loss=soft",
        "--algorithm.policy_loss.low=0.3",
        "--algorithm.policy_loss.options.on=true",
        "--algorithm.policy_loss.sizes=1,2",
    ).config
    assert config.algorithm.policy_loss.options == {"low": 0.3, "on": True, "sizes": [1, 2]}
    assert solve((), "--optimizer.lr", "2e-4").config.optimizer.lr == 2e-4
    filters = solve((), "--rollout-filters", "sieve", "--rollout.filters.0.low=0.7").config.rollout.filters
    assert filters[0].options == {"low": 0.7}
    assert solve((), "--data.chat_template_kwargs.think=false").config.data.chat_template_kwargs == {"think": False}


def test_flags_of_components_go_to_the_selected_one(solve):
    config = solve((), "--loss-low", "0.05", "--loss-on", "--loss-sizes", "3", "4", "--policy-loss", "soft").config
    assert config.algorithm.policy_loss.options == {"low": 0.05, "on": True, "sizes": [3, 4]}
    with pytest.raises(ConfigFaults, match=r"policy loss 'soft' of .*not selected"):
        solve((), "--loss-low", "0.05")
    with pytest.raises(ConfigFaults, match="valid number"):
        solve((), "--loss-low", "much", "--policy-loss", "soft")


def test_a_switch_that_may_be_left_open_is_a_switch(solve):
    given = [solve((), "--policy-loss", "soft", f"--{no}loss-perhaps").config for no in ("", "no-")]
    assert [config.algorithm.policy_loss.options for config in given] == [{"perhaps": True}, {"perhaps": False}]


def test_engine_flags_need_their_engine(solve):
    assert solve((), "--torch-max-running", "5").config.rollout.engine.options == {"max_running": 5}
    with pytest.raises(ConfigFaults, match=r"--torch-max-running[^,]*\n.*'torch', which is not selected"):
        solve((), "--torch-max-running", "5", "--rollout-engine", "none", "--generate", "dataset")


def test_unknown_flags_get_suggestions(solve):
    with pytest.raises(ConfigFaults, match="did you mean --rollout-batch-size"):
        solve((), "--rollout-batchsize", "4")
    with pytest.raises(ConfigFaults, match=r"did you mean rollout\.batch_size"):
        solve((), "--rollout.batch_sise=4")
    with pytest.raises(ConfigFaults, match="config files come first"):
        solve((), "--colocate", "late.yaml")
    with pytest.raises(ConfigFaults, match="needs a value"):
        solve((), "--lr")
