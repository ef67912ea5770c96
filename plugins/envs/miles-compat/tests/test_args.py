"""`args`: the run's settings under upstream's names, its defaults, and what is neither."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from miles_compat.defaults import DEFAULTS, FURTHER
from miles_compat.namespace import args

ROOT = Path(__file__).parents[4]


def test_settings_have_upstreams_names(configured, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("top_k_documents: 3\nrollout_seed: 7\n")
    words = "--rollout-batch-size 6 --rollout-max-response-len 33 --rollout-stop END --lr 1e-4 --n-samples-per-prompt 5"
    words += " --custom-generate-function-path single.generate --custom-rm-path judges.exact --reward-key score"
    words += " --dynamic-sampling-filter-path judges.any_right --eval-prompt-data held prompts.jsonl"
    words += f" --eval-max-response-len 44 --custom-config-path {config} --data.sets.default.generate.args.mine=4"
    configured(*words.split())
    read = args()
    assert (read.rollout_batch_size, read.rollout_max_response_len, read.eval_max_response_len) == (6, 33, 44)
    assert (read.rollout_stop, read.rollout_stop_token_ids, read.lr) == (["END"], None, 1e-4)
    assert (read.n_samples_per_prompt, read.advantage_estimator) == (5, "grpo")
    assert (read.custom_generate_function_path, read.custom_rm_path) == ("single.generate", "judges.exact")
    assert (read.reward_key, read.group_rm, read.eval_reward_key) == ("score", False, None)
    assert read.dynamic_sampling_filter_path == "judges.any_right"
    assert (read.top_k_documents, read.rollout_seed, read.mine) == (3, 7, 4)
    assert read.prompt_data.endswith("prompts.jsonl")


def test_what_the_run_has_not_is_upstreams_default(configured):
    read = args()
    assert (read.ci_test, read.partial_rollout, read.sglang_speculative_algorithm) == (False, False, None)
    assert (read.rollout_global_dataset, read.lora_rank) == (True, 0)
    assert (read.num_layers, read.hidden_size, read.vocab_size) == (2, 16, 320)
    configured(model="qwen3_moe")
    assert (args().moe_router_topk, args().num_experts) == (2, 4)


def test_there_is_one_and_what_is_set_stays(configured):
    args().my_state = 3
    assert args().my_state == 3
    configured()
    with pytest.raises(AttributeError, match=r"args.my_state: .*args: \{my_state: \.\.\.\}"):
        _ = args().my_state


def test_defaults_are_those_of_the_list_of_upstreams_flags():
    spec = importlib.util.spec_from_file_location("migrating_for_compat", ROOT / "scripts" / "migrating.py")
    migrating = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = migrating
    spec.loader.exec_module(migrating)
    listed = {}
    for flag in reversed(migrating.upstream_flags()):
        name = flag.name.removeprefix("disable-") if flag.default == "negflag" else flag.name
        if flag.group not in ("fsdp", "megatron", migrating.VALUE_GROUP):
            listed[name.replace("-", "_")] = migrating.parsed(flag.default)
    assert {name: value for name, value in DEFAULTS.items() if name not in FURTHER} == {
        name: listed[name] for name in DEFAULTS if name not in FURTHER
    }
    assert [name for name in FURTHER if listed.get(name, migrating.UNKNOWN) is not migrating.UNKNOWN] == []
