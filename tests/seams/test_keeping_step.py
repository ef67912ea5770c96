"""Memory that runs out on one rank: all raise, none waits, and the step taken again is the step without it."""

import json

import pytest

WORK = "keeping_step"
WHO = {
    # scenario: (rank that is blamed, whether one sample alone was too much, its tokens)
    "forward, first micro-batch": (0, False, 13),
    "forward, second micro-batch": (1, False, 18),
    "the last rank": (1, True, 5),
    "backward, first micro-batch": (1, True, 5),
    "backward, second micro-batch": (0, True, 12),
    "both at different places": (1, False, 18),  # of two alike, the one with more tokens
    "both, forward and forward": (1, True, 5),  # of two, the one that nothing can be done about
    "before anything": (1, False, 0),
    "the loss": (0, False, 13),
    "optimizer": (1, False, 0),
    "step: forward": (0, False, 13),
    "step: forward, second micro-batch": (1, False, 18),
    "step: backward": (1, True, 5),
    "step: backward, second micro-batch": (1, False, 18),
    "step: both, different places": (1, False, 18),
    "checkpointing: forward": (0, False, 13),
    "checkpointing: recomputation": (1, True, 5),
    "checkpointing: backward": (1, True, 5),
    "bf16: backward": (1, True, 5),
    "bf16, step: backward": (1, False, 18),
    "grouped: forward": (0, False, 13),
    "grouped: recomputation": (1, True, 5),
    "grouped: backward": (1, True, 5),
    "grouped, step: backward": (1, False, 18),
    "moe: backward": (0, False, 13),
    "critic: backward": (0, False, 13),
    "critic: forward": (1, False, 18),
    "critic, step: backward": (1, True, 5),
    "old torch": (0, False, 13),
}
FOUR = {
    "both, forward and forward": (1, True, 5),
    "the last rank": (3, True, 5),
    "step: backward, second micro-batch": (1, False, 18),
}


def facts(folder, rank, size):
    return json.loads((folder / f"facts-{rank}-of-{size}.json").read_text())


@pytest.mark.parametrize(
    ("scenario", "size"), [*((name, 2) for name in WHO), *((name, 4) for name in FOUR)], ids=lambda x: str(x)
)
def test_all_ranks_raise_alike_and_the_next_attempt_is_as_the_first_would_have_been(communication, scenario, size):
    blamed, alone, tokens = (WHO if size == 2 else FOUR)[scenario]
    expected = {"raised": True, "rank": blamed, "alone": alone, "tokens": tokens, "sharded": True, "same": True}
    for rank in range(size):
        assert facts(communication, rank, size)["scenarios"][scenario] == expected


@pytest.mark.parametrize("mode", ["layer", "step"])
def test_log_probs_can_be_asked_for_again(communication, mode):
    assert [facts(communication, rank, 2)["log_probs"][mode] for rank in (0, 1)] == [True, True]


def test_memory_may_run_out_before_the_model_ever_worked(communication):
    assert [facts(communication, rank, 2)["first_of_all"] for rank in (0, 1)] == [True, True]


def test_layers_are_gathered_twice_a_micro_batch_or_once_a_step(communication):
    found = facts(communication, 0, 2)["counted"]
    layers, root = 2, 1
    for count in (1, 3):
        both_ways = {"gather": count * (2 * layers + root), "reduce": count * (layers + root)}
        assert found[f"layer-{count}"] == both_ways
        assert found[f"step-{count}"] == {"gather": layers + root, "reduce": layers + root}


def test_gathering_once_a_step_is_the_same_training(communication):
    found = facts(communication, 0, 2)["counted"]
    by_layer, by_step = found["layer-weights"], found["step-weights"]
    assert by_layer.keys() == by_step.keys()
    for name in by_layer:
        assert by_step[name] == pytest.approx(by_layer[name], abs=1e-6)


def test_what_fits_is_gathered_once_a_step_until_memory_runs_out_anywhere(communication):
    at_first, after, gathers_again = True, False, True
    for rank in (0, 1):
        assert facts(communication, rank, 2)["adapts"] == [at_first, after, gathers_again]


@pytest.mark.parametrize("place", ["forward", "backward", "backward, old torch"])
@pytest.mark.parametrize("case", ["grouped", "grouped by step"])
def test_a_rank_that_accompanies_others_holds_nothing_of_what_did_not_fit_and_two_units_at_most(
    communication, case, place
):
    found = facts(communication, 1, 2)["lets_go"][f"{case}, {place}"]
    at_first, after_one, after_both = found["left"]
    assert (at_first, after_one, after_both) == (0, 0, 0)
    assert found["took"] > 2**20  # bytes
    assert found["whole"] == 2  # of five: one that is used, and the root


def test_a_train_worker_takes_the_step_again_with_halves_alike_on_all_ranks(communication):
    first, second = (facts(communication, rank, 2)["worker"] for rank in (0, 1))
    for found in (first, second):
        assert (found["calm"], found["hit"]) == (0, 1)
        assert found["losses"]["hit"] == pytest.approx(found["losses"]["calm"], abs=1e-9)
        for name, weight in found["calm weights"].items():
            assert found["hit weights"][name] == pytest.approx(weight, abs=1e-9)
    assert (first["hit seen"], second["hit seen"]) == ([1, 1, 1, 0], [1, 0, 1, 1])  # samples of the micro-batches


def test_a_train_workers_forward_keeps_its_order(communication):
    assert facts(communication, 0, 2)["worker"]["forward"] == [[9, 4], [12]]
    assert facts(communication, 1, 2)["worker"]["forward"] == [[5], [7, 11]]
