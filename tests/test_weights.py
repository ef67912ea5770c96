"""Weight ops against tensors laid out by hand, and the bridge that falls out of a list of them."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles.api import ConfigError, Part, Sharding, Share, WeightError
from miles.toolkit import COLUMN, ROW, Concat, Form, Inverse, OpBridge, Stack, Weight, cut_shard, join_shards

CONFIG = SimpleNamespace(model_type="toy", num_hidden_layers=4)
EXPERTS = 4


class ToyBridge(OpBridge):
    """Four layers of attention (2 query heads, 2 key-value heads of size 2) and four experts."""

    def weights(self, hf_config):
        layers = range(hf_config.num_hidden_layers)
        return [
            Weight(("embed",), {"fused": Form("in")}, dim=COLUMN, rows=6),
            Weight(
                ("model.{i}.q", "model.{i}.k", "model.{i}.v"),
                {"fused": Form("{i}.qkv", Concat((2, 2, 2), groups=2))},
                dim=COLUMN,
                layers=layers,
            ),
            Weight(("model.{i}.o",), {"fused": Form("{i}.out")}, dim=ROW, layers=layers),
            Weight(
                ("model.{i}.experts.{e}.gate", "model.{i}.experts.{e}.up"),
                {"fused": Form("{i}.experts", Concat((1, 1)), Stack()), "apart": Form("{i}.{e}", Concat((1, 1)))},
                dim=COLUMN,
                layers=layers,
                experts=EXPERTS,
            ),
            Weight(("head",), {"fused": Form("out")}, dim=COLUMN, stage="last", rows=6),
        ]

    def copies(self, hf_config):
        return {"again": "embed"}


def checkpoint() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = {"embed": (6, 4), "head": (6, 4)}
    for i in range(4):
        names |= {f"model.{i}.{part}": (4, 4) for part in "qkvo"}
        names |= {f"model.{i}.experts.{e}.{part}": (2, 4) for e in range(EXPERTS) for part in ("gate", "up")}
    return {name: torch.randn(*shape, generator=generator) for name, shape in names.items()}


def singly(tensors, seed=0):
    """One tensor a group, in random order."""
    items = list(tensors.items())
    random.Random(seed).shuffle(items)
    return [{name: tensor} for name, tensor in items]


def merged(groups):
    together: dict[str, torch.Tensor] = {}
    for group in groups:
        assert not together.keys() & group.keys()
        together |= group
    return together


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------------ ops


def test_concat_puts_rows_one_after_another():
    a, b = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0]])
    (fused,) = Concat((2, 1)).forward([a, b], 1)
    assert fused.tolist() == [[1], [2], [3]]
    assert [part.tolist() for part in Concat((2, 1)).inverse([fused], 1)] == [[[1], [2]], [[3]]]


def test_groups_interleave_heads():
    """4 query heads, 2 key-value heads, heads of one row: q0 q1 k0 v0, q2 q3 k1 v1, which is Megatron's order."""
    q, k, v = torch.arange(4), torch.arange(10, 12), torch.arange(20, 22)
    op = Concat((4, 2, 2), groups=2)
    (fused,) = op.forward([q, k, v], 1)
    assert fused.tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert [part.tolist() for part in op.inverse([fused], 1)] == [q.tolist(), k.tolist(), v.tolist()]


def test_concat_takes_several_sets():
    tensors = [torch.full((1,), float(value)) for value in range(4)]
    assert [t.tolist() for t in Concat((1, 1)).forward(tensors, 1)] == [[0, 1], [2, 3]]


def test_stack_and_its_inverse():
    tensors = [torch.ones(2, 3), torch.zeros(2, 3)]
    (stacked,) = Stack().forward(tensors, 1)
    assert stacked.shape == (2, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(Stack().inverse([stacked], 1), tensors, strict=True))


def test_inverse_splits():
    parts = Inverse(Concat((2, 1))).forward([torch.arange(6)], 1)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4, 5]]
    assert Inverse(Concat((2, 1))).inverse(parts, 1)[0].tolist() == list(range(6))


@given(
    heads_per_group=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4]),
    head_rows=st.integers(1, 3),
    shards=st.sampled_from([1, 2, 4]),
)
def test_interleaving_commutes_with_cutting(heads_per_group, groups, head_rows, shards):
    """Fusing the pieces gives the pieces of the fused tensor: each rank needs only its own rows."""
    if groups % shards:
        return
    heads = heads_per_group * groups
    op = Concat((heads, groups, groups), groups=groups)
    q, k, v = torch.randn(heads * head_rows, 2), torch.randn(groups * head_rows, 2), torch.randn(groups * head_rows, 2)
    (whole,) = op.forward([q, k, v], 1)
    for rank in range(shards):
        part = Part(tensor=Share(rank, shards))
        pieces = [cut_shard(t, Sharding(0), part) for t in (q, k, v)]
        (fused,) = op.forward(pieces, shards)
        assert torch.equal(fused, whole.chunk(shards)[rank])
        assert all(torch.equal(a, b) for a, b in zip(op.inverse([fused], shards), pieces, strict=True))


def test_rows_that_do_not_compare_are_refused():
    with pytest.raises(WeightError, match=r"rows \[2, 3\] do not compare as \(1, 1\)"):
        Concat((1, 1)).forward([torch.zeros(2), torch.zeros(3)], 1)
    with pytest.raises(WeightError, match="5 rows cannot be split"):
        Concat((1, 1)).inverse([torch.zeros(5)], 1)
    with pytest.raises(WeightError, match="2 key-value groups cannot be divided among 4"):
        Concat((2, 2, 2), groups=2).forward([torch.zeros(1)] * 3, 4)


def test_uneven_cuts_are_refused():
    with pytest.raises(WeightError, match="cannot be cut in 2 along dimension 0"):
        cut_shard(torch.zeros(3, 2), Sharding(0), Part(tensor=Share(0, 2)))


# ------------------------------------------------------------------------------------------------------------ streaming


def test_a_tensor_is_yielded_when_its_last_part_arrives():
    tensors = checkpoint()
    arrived: list[str] = []

    def source():
        for name in ["model.0.v", "head", "model.0.q", "model.0.k"]:
            arrived.append(name)
            yield {name: tensors[name]}

    stream = ToyBridge().to_world("fused", CONFIG, source())
    assert list(next(stream)) == ["out"]
    assert arrived == ["model.0.v", "head"]
    assert list(next(stream)) == ["0.qkv"]
    with pytest.raises(
        WeightError, match=r"tensors are missing in a checkpoint of 'toy': embed, model.0.experts.0.gate"
    ):
        next(stream)


@given(seed=st.integers(0, 1000))
def test_round_trip_in_any_order(seed):
    tensors = checkpoint()
    for world in ("fused", "hf"):
        there = merged(ToyBridge().to_world(world, CONFIG, singly(tensors, seed)))
        assert same(merged(ToyBridge().from_world(world, CONFIG, singly(there, seed + 1))), tensors)


def test_groups_going_back_are_what_an_engine_loads_together():
    there = merged(ToyBridge().to_world("fused", CONFIG, [checkpoint()]))
    back = list(ToyBridge().from_world("fused", CONFIG, [there]))
    assert ["model.1.q", "model.1.k", "model.1.v"] in [list(group) for group in back]
    assert ["model.3.experts.2.gate", "model.3.experts.2.up"] in [list(group) for group in back]
    plain = list(ToyBridge().from_world("hf", CONFIG, singly(checkpoint())))
    assert {"model.1.q", "model.1.k", "model.1.v"} in [set(group) for group in plain]


def test_input_is_let_go_once_used():
    """Nothing of a layer is held when the next one comes."""
    import weakref

    alive: list[weakref.ref] = []

    def source():
        for i in range(4):
            names = [f"model.{i}.{part}" for part in "qkvo"]
            names += [f"model.{i}.experts.{e}.{part}" for e in range(EXPERTS) for part in ("gate", "up")]
            for name in names:
                tensor = torch.zeros(4, 4) if name[-2] == "." else torch.zeros(2, 4)
                alive.append(weakref.ref(tensor))
                yield {name: tensor}
            del tensor
            assert sum(ref() is not None for ref in alive) <= 2
        yield {"embed": torch.zeros(6, 4), "head": torch.zeros(6, 4)}

    for _ in ToyBridge().to_world("fused", CONFIG, source()):
        pass
    assert len(alive) == 4 * 12


def test_unknown_and_repeated_tensors_are_named():
    tensors = checkpoint()
    with pytest.raises(WeightError, match=r"unknown tensor 'model\.0\.w' .*closest known is 'model\.0\.[vqko]'"):
        list(ToyBridge().to_world("fused", CONFIG, [{"model.0.w": tensors["head"]}]))
    with pytest.raises(WeightError, match="tensor 'head' came twice"):
        list(ToyBridge().to_world("fused", CONFIG, [{"head": tensors["head"]}] * 2))
    with pytest.raises(WeightError, match=r"13 tensors are missing in the 'fused' tensors of 'toy': 0\.exp"):
        list(ToyBridge().from_world("fused", CONFIG, [{"out": tensors["head"]}]))


def test_a_wrong_shape_names_the_tensors():
    tensors = checkpoint() | {"model.2.k": torch.zeros(3, 4)}
    with pytest.raises(WeightError, match=r"model\.2\.q \[4, 4\], model\.2\.k \[3, 4\]"):
        list(ToyBridge().to_world("fused", CONFIG, [tensors]))


def test_an_unknown_world_names_the_known_ones():
    with pytest.raises(ConfigError, match="'jax'.*apart, fused, hf, torch"):
        list(ToyBridge().to_world("jax", CONFIG, []))


def test_old_buffers_and_copies_are_left_out():
    tensors = checkpoint()
    extra = {"model.0.rotary_emb.inv_freq": torch.zeros(2), "again": tensors["embed"].clone()}
    assert same(merged(ToyBridge().to_world("hf", CONFIG, singly(tensors | extra))), tensors)


def test_a_copy_that_differs_is_refused():
    tensors = checkpoint()
    with pytest.raises(WeightError, match="'again' differs from 'embed'"):
        list(ToyBridge().to_world("hf", CONFIG, singly(tensors | {"again": tensors["embed"] + 1})))


# --------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("tensor_size", [1, 2])
@pytest.mark.parametrize("expert_ranks", [1, 2])
@pytest.mark.parametrize("stages", [1, 2])
def test_parts_together_are_the_whole(tensor_size, expert_ranks, stages):
    """Load each rank's part, export it, and put the shards together: every checkpoint tensor comes back, once."""
    bridge, tensors = ToyBridge(), checkpoint()
    shards: dict[str, list[torch.Tensor]] = {}
    for stage in range(stages):
        layers = range(stage * 4 // stages, (stage + 1) * 4 // stages)
        for expert_rank in range(expert_ranks):
            experts = range(expert_rank * 4 // expert_ranks, (expert_rank + 1) * 4 // expert_ranks)
            for rank in range(tensor_size):
                share = Share(rank, tensor_size)
                part = Part(layers, experts, share, share, vocab_rows=8)
                there = merged(bridge.to_world("fused", CONFIG, singly(tensors), part))
                assert there["0.experts"].shape == (4 // expert_ranks, 4 // tensor_size, 4)
                assert ("in" in there) == (stage == 0)
                assert ("out" in there) == (stage == stages - 1)
                for name, tensor in merged(bridge.from_world("fused", CONFIG, singly(there), part)).items():
                    if expert_rank == 0 or ".experts." in name:
                        shards.setdefault(name, []).append(tensor)
    assert all(len(pieces) == tensor_size for pieces in shards.values())
    assert same({name: join_shards(pieces, bridge.sharding(CONFIG, name)) for name, pieces in shards.items()}, tensors)


def test_names_within_a_part_start_at_zero():
    part = Part(layers=range(2, 4), experts=range(2, 4))
    there = merged(ToyBridge().to_world("apart", CONFIG, [checkpoint()], part))
    assert sorted(there) == ["0.0", "0.1", "1.0", "1.1"]
    assert torch.equal(there["1.0"][:2], checkpoint()["model.3.experts.2.gate"])


def test_padding_of_the_vocabulary_is_zeros():
    there = merged(ToyBridge().to_world("fused", CONFIG, [checkpoint()], Part(vocab_rows=8)))
    assert there["in"].shape == (8, 4)
    assert not there["in"][6:].any()
    assert join_shards([there["in"]], ToyBridge().sharding(CONFIG, "embed")).shape == (6, 4)


def test_sharding_is_known_by_checkpoint_name():
    assert ToyBridge().sharding(CONFIG, "model.3.o") == Sharding(ROW)
    assert ToyBridge().sharding(CONFIG, "model.3.experts.1.up") == Sharding(COLUMN, expert=True)
    with pytest.raises(WeightError, match=r"model\.3\.p"):
        ToyBridge().sharding(CONFIG, "model.3.p")
