"""Results do not change with the number of ranks."""

import re

import pytest
import torch
from miniature import final_state, metrics

import miles
from miles.api import Component, PluginConflictError, hookimpl
from miles.report.compare import compare


def test_a_replay_in_float64_is_the_same_on_any_number_of_ranks(config, tmp_path):
    """Of samples that are long and short, in several micro-batches."""
    config["train"]["max_tokens_per_gpu"] = 64
    config["rollout"]["num_rollout"] = 4
    miles.train(config, dump=str(tmp_path / "dump"))
    config["data"]["sets"][0]["reward"] = "exact_match"  # what nobody will ask for
    config["eval"] = {}
    for ranks in (1, 2, 4):
        run_on(config, tmp_path, ranks, replay=str(tmp_path / "dump"), train_dtype="fp64")
    first, *others = (actor_in(tmp_path / f"run-{ranks}") for ranks in (1, 2, 4))
    assert {tensor.dtype for tensor in first.values()} == {torch.float64}
    for weights in others:
        assert weights.keys() == first.keys()
        for name, tensor in first.items():
            torch.testing.assert_close(weights[name], tensor, atol=1e-9, rtol=0)
    first, *others = ([{**step} for step in metrics(tmp_path / f"run-{ranks}")] for ranks in (1, 2, 4))
    for steps in others:
        for before, after in zip(first, steps, strict=True):
            assert after == pytest.approx(before, rel=1e-3, abs=1e-4)


def actor_in(run_dir):
    """Its parameters, as the newest checkpoint has them."""
    found = {name: value for name, value in final_state(run_dir).items() if name.startswith("actor/parameter/")}
    assert found
    return found


def run_on(config, tmp_path, ranks, **flags):
    folder = tmp_path / f"run-{ranks}"
    executor = "inprocess" if ranks == 1 else "local"
    return miles.train(
        config, run_dir=str(folder), executor=executor, actor_num_gpus_per_node=ranks, save_hf="hf", **flags
    )


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_run_of_several_ranks_is_that_of_one(config, tmp_path, ranks):
    """The same tokens, and the same numbers to rounding."""
    config["rollout"]["num_rollout"] = 4
    for count in (1, ranks):
        run_on(config, tmp_path, count)
    found = compare(tmp_path / "run-1", tmp_path / f"run-{ranks}")
    assert found.first_token is None, found.first_token
    assert found.within(1e-5)
    assert found.weights < 1e-5


class Mine:
    __name__ = "mine"

    @hookimpl
    def miles_register_rewards(self):
        return {"mine": Component("mine:score")}


def test_workers_refuse_other_plugins_than_the_drivers(config, tmp_path):
    with pytest.raises(PluginConflictError, match=r"\n  mine: not installed here\n.* given in Python") as raised:
        run_on(config, tmp_path, 2, plugins=[Mine()])
    assert re.fullmatch(r"raised by train rank [01] in .*TrainWorker", raised.value.__notes__[0])
