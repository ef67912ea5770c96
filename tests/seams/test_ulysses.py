"""Context parallelism: ranks that divide the tokens of a micro-batch do what one process does."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config

from miles.builtins.fsdp.ulysses import check_context
from miles.config import Config
from miles.errors import ConfigError

WORK = "ulysses"
PLANS = [(2, 2, case) for case in ("dense", "critic", "moe", "one key head", "sliding")]
PLANS += [(4, 2, "dense"), (4, 2, "moe"), (4, 4, "dense"), (4, 4, "critic")]
every_plan = pytest.mark.parametrize(("size", "together", "case"), PLANS)


def trained(folder, rank, size, together, case):
    facts = json.loads((folder / f"facts-{rank}-of-{size}.json").read_text())
    return facts[str(together)]["trained"][case]


def of_shares(folder, size, together, case):
    """The first rank of each share."""
    return [trained(folder, rank, size, together, case) for rank in range(0, size, together)]


@every_plan
def test_three_steps_end_at_the_same_weights(communication, size, together, case):
    one, many = (load_file(communication / f"{case}-{n}-{t}.safetensors") for n, t in ((1, 1), (size, together)))
    assert one.keys() == many.keys()
    for name in one:
        assert one[name].dtype == torch.float64
        torch.testing.assert_close(many[name], one[name], atol=1e-9, rtol=0)


@every_plan
def test_log_probs_entropies_and_values_are_those_of_one_process(communication, size, together, case):
    expected = trained(communication, 0, 1, 1, case)["scores"]
    shares = [share["scores"] for share in of_shares(communication, size, together, case)]
    for name, rows in expected.items():
        found = [row for share in shares for row in share[name]]
        assert len(found) == len(rows)
        for row, wanted in zip(found, rows, strict=True):
            assert row == pytest.approx(wanted, abs=1e-9)


@every_plan
def test_sums_add_up_over_shares_and_norms_are_everybodys(communication, size, together, case):
    one = trained(communication, 0, 1, 1, case)
    shares = of_shares(communication, size, together, case)
    for step, expected in enumerate(one["sums"]):
        for name, value in expected.items():
            assert sum(share["sums"][step][name] for share in shares) == pytest.approx(value, abs=1e-9)
    assert shares[0]["norms"] == pytest.approx(one["norms"], rel=1e-9)


@every_plan
def test_ranks_of_a_group_say_the_same_to_the_last_bit(communication, size, together, case):
    for rank in range(size):
        facts = trained(communication, rank, size, together, case)
        first = trained(communication, rank - rank % together, size, together, case)
        assert facts["share"] == [rank // together, size // together]
        assert (facts["sums"], facts["scores"], facts["norms"]) == (first["sums"], first["scores"], first["norms"])


def test_shared_prompts_were_computed_once(communication):
    for case in ("dense", "critic", "one key head", "sliding"):
        assert trained(communication, 0, 2, 2, case)["shared"]


def test_a_rank_of_a_group_that_runs_out_of_memory_keeps_step(communication):
    for rank in range(4):
        for size, together in ((2, 2), (4, 2)):
            if rank < size:
                facts = json.loads((communication / f"facts-{rank}-of-{size}.json").read_text())
                retried = facts[str(together)]["retried"]
                assert retried
                assert all(retried.values()), retried


@pytest.mark.parametrize(
    ("train", "world", "heads", "says"),
    [
        ({"context_parallel_size": 2}, 3, 4, "does not divide the 3 train ranks; --context-parallel-size 1 would"),
        (
            {"context_parallel_size": 4},
            4,
            6,
            "6 attention heads of the model; --context-parallel-size 1 or 2 would",
        ),
        ({"context_parallel_size": 2, "reproducible_ranks": 4}, 4, 4, "it needs --context-parallel-size 1"),
        ({"fsdp_reshard": "step", "reproducible_ranks": 4}, 4, 4, "--fsdp-reshard layer or auto"),
    ],
)
def test_what_cannot_be_divided_is_refused(train, world, heads, says):
    with pytest.raises(ConfigError, match=says):
        check_context(Config.model_validate({"train": train}), world, Qwen3Config(num_attention_heads=heads))
