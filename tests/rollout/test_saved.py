"""Groups in files: what comes back is what went in."""

import dataclasses
import json
import time
import zipfile
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numbers

from miles.errors import DataError
from miles.rollout.saved import read_groups, write_groups
from miles.types import (
    LOSS_MASK,
    ROLLOUT_LOG_PROBS,
    Column,
    Group,
    Prompt,
    Sample,
    Status,
    Turn,
    routed_experts_column,
)

EXPERTS = routed_experts_column(layers=3, top_k=2, experts=64)
WIDE = Column("hidden", "float64", fill=0.5, width=(2, 2))


def a_group(id=3, tokens=(1, 2, 3), samples=2, **metadata):
    prompt = Prompt(f"set:{id}", "set", text="What?", label={"answer": (1, 2)}, tokens=list(tokens))
    made = []
    for i in range(samples):
        sample = Sample.begin(prompt, id=10 * id + i, group_id=id, seed=2**62 + i)
        sample.append([7, 8], {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: [-0.1, -1 / 3]})
        sample.append([9])
        sample.status, sample.reward, sample.text = Status.COMPLETED, 0.1 + 0.2, "sept, huit \ud800"
        sample.turns = [Turn(3, 5, "stop", 0.25, 0.5, reward=1.0)]
        sample.metadata = dict(metadata)
        made.append(sample)
    return Group(id, prompt, made)


def same(one, two):
    """Equal, to the types and the bits."""
    assert type(one) is type(two)
    if dataclasses.is_dataclass(one):
        for f in dataclasses.fields(one):
            if f.init:
                same(getattr(one, f.name), getattr(two, f.name))
    elif isinstance(one, dict):
        for (key, value), (other_key, other) in zip(one.items(), two.items(), strict=True):
            same(key, other_key)
            same(value, other)
    elif isinstance(one, list | tuple):
        for a, b in zip(one, two, strict=True):
            same(a, b)
    elif isinstance(one, np.ndarray | np.generic):
        assert (one.dtype, one.shape, one.tobytes()) == (two.dtype, two.shape, two.tobytes())
    elif isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (two.dtype, two.shape)
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8))
    else:
        assert one == two or (one != one and two != two)


def round_trip(tmp_path, groups):
    path = tmp_path / "groups.npz"
    write_groups(path, groups)
    return read_groups(path)


class Kind(str, Enum):  # noqa: UP042 - its text differs from its value
    GOOD = "good"


KEYS = st.text(max_size=4) | st.just("~")
ARRAYS = numbers.arrays(
    st.sampled_from(["bool", "uint8", "<i2", ">i4", "float16", "float64", "complex64", "<U3", "datetime64[s]"]),
    numbers.array_shapes(min_dims=0, min_side=0, max_side=3),
)
TENSORS = st.builds(
    lambda dtype, shape: torch.arange(4.0).to(dtype)[: shape[0]].reshape(shape),
    st.sampled_from([torch.bfloat16, torch.float32, torch.int64, torch.bool, torch.float8_e4m3fn]),
    st.sampled_from([(0,), (1,), (2, 1), (4,)]),
)
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
VALUES = st.recursive(
    ATOMS | ARRAYS | TENSORS | ARRAYS.filter(lambda a: a.ndim == 0).map(lambda a: a[()]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), KEYS), inner, max_size=2)
    ),
    max_leaves=6,
)
FLOATS = st.none() | st.floats()
TOKENS = st.lists(st.integers(0, 2**31 - 1), max_size=5)


@st.composite
def samples(draw, prompt, group_id):
    sample = Sample.begin(prompt, id=draw(st.integers(-5, 10**9)), group_id=group_id, seed=draw(st.integers(0, 2**63)))
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(TOKENS)
        columns = {}
        for column in draw(st.sets(st.sampled_from([LOSS_MASK, ROLLOUT_LOG_PROBS, EXPERTS, WIDE]))):
            missing = column.offset and len(sample.tokens) == 0
            if not missing:
                bits = draw(st.randoms(use_true_random=False)).getrandbits(32)
                rows = np.random.default_rng(bits).integers(0, 100, (len(tokens), *column.width))
                columns[column] = rows.astype(column.dtype)
        sample.append(tokens, columns)
    sample.turns = draw(st.lists(st.builds(Turn, st.integers(), st.integers(), st.text(), reward=FLOATS), max_size=2))
    sample.status = draw(st.sampled_from(Status))
    sample.rollout_id, sample.max_new_tokens = draw(st.integers(0, 99)), draw(st.none() | st.integers())
    sample.reward, sample.reward_before_terms = draw(FLOATS), draw(FLOATS)
    sample.reward_parts = draw(st.dictionaries(KEYS, st.floats(), max_size=2))
    sample.text, sample.error = draw(st.text()), draw(st.none() | st.text())
    sample.messages = draw(st.lists(st.dictionaries(KEYS, VALUES, max_size=2), max_size=2))
    sample.multimodal = draw(st.dictionaries(KEYS, TENSORS | ARRAYS, max_size=2))
    sample.metadata = draw(st.dictionaries(KEYS, VALUES, max_size=3))
    return sample


@st.composite
def some_groups(draw):
    made = []
    for id in range(draw(st.integers(0, 3))):
        prompt = Prompt(draw(st.text()), "set", draw(st.text()), tokens=draw(TOKENS), label=draw(VALUES))
        prompt.tools = draw(st.none() | st.lists(st.dictionaries(KEYS, VALUES, max_size=2), max_size=1))
        baseline = draw(st.none() | samples(prompt, id))
        inner = draw(st.lists(samples(prompt, id), max_size=3))
        made.append(Group(id, prompt, inner, baseline, draw(FLOATS)))
    return made


@given(some_groups())
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_written_is_read(tmp_path_factory, groups):
    back = round_trip(tmp_path_factory.mktemp("saved"), groups)
    same(back, groups)
    for group in back:
        assert all(sample.prompt is group.prompt for sample in group.rollouts)


def test_what_is_shared_stays_shared(tmp_path):
    group = a_group()
    pixels = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    for sample in group.samples:
        sample.multimodal = {"pixel_values": pixels}
    other = a_group(4)
    group.samples.append(group.samples[0])
    one, two = round_trip(tmp_path, [group, other])
    assert one.samples[2] is one.samples[0]
    assert one.samples[0].multimodal["pixel_values"] is one.samples[1].multimodal["pixel_values"]
    assert one.samples[1].prompt is one.prompt
    assert two.prompt is not one.prompt


def test_a_sample_that_was_read_goes_on_growing(tmp_path):
    written, read = a_group(), round_trip(tmp_path, [a_group()])[0]
    for group in (written, read):
        for sample in group.samples:
            sample.append([5, 6], {LOSS_MASK: 1, EXPERTS: np.ones((2, 3, 2))})
            sample.columns[LOSS_MASK.name][0] = 1
    same(read, written)


def test_an_enum_comes_back_as_what_it_equals(tmp_path):
    (group,) = round_trip(tmp_path, [a_group(fate=Status.FAILED, kind=Kind.GOOD)])
    assert group.samples[0].metadata == {"fate": "failed", "kind": "good"}
    assert group.samples[0].status is Status.COMPLETED


def test_equal_groups_make_equal_files(tmp_path):
    for name in ("one", "two"):
        write_groups(tmp_path / name, [a_group(when=np.arange(3))])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


class Verdict:
    pass


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (Verdict(), "Verdict"),
        (Path("."), "PosixPath"),
        (np.array([None]), "dtype object"),
        (torch.eye(2).to_sparse(), "sparse"),
    ],
)
def test_what_cannot_be_written_down(tmp_path, value, what):
    path = tmp_path / "groups.npz"
    write_groups(path, [a_group()])
    with pytest.raises(DataError, match=rf"sample 30 of prompt set:3: metadata\['judge'\]\[1\] is a .*{what}"):
        write_groups(path, [a_group(judge=[0, value])])
    assert [file.name for file in tmp_path.iterdir()] == ["groups.npz"]
    assert len(read_groups(path)) == 1


def test_a_column_of_objects_is_refused(tmp_path):
    group = a_group()
    group.samples[1].columns["odd"] = np.array([object()] * 6)
    with pytest.raises(DataError, match="sample 31 of prompt set:3: column 'odd'"):
        write_groups(tmp_path / "groups.npz", [group])


def test_a_file_that_is_missing_or_none_of_ours(tmp_path):
    with pytest.raises(DataError, match=r"groups\.npz cannot be read: No such file"):
        read_groups(tmp_path / "groups.npz")
    (tmp_path / "text").write_text("tokens")
    with pytest.raises(DataError, match="text is damaged or no file of samples"):
        read_groups(tmp_path / "text")
    np.savez(tmp_path / "other.npz", tokens=np.arange(3))
    with pytest.raises(DataError, match="damaged or no file of samples"):
        read_groups(tmp_path / "other.npz")


@pytest.mark.parametrize("changes", [{"format": "miles groups 2"}, {"groups": [{"id": 1, "colour": "red"}]}])
def test_a_file_of_another_version(tmp_path, changes):
    path = tmp_path / "groups.npz"
    header = {"format": "miles groups 1", "groups": [], "prompts": [], "samples": [], "specs": []} | changes
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("header.json", json.dumps(header))
    with pytest.raises(DataError, match=r"groups\.npz is of (another|a newer) version of miles: .*(groups 2|colour)"):
        read_groups(path)


def test_damage_is_found_or_harmless(tmp_path):
    """Whichever byte changes, and wherever the file ends."""
    path = tmp_path / "groups.npz"
    groups = [a_group(mask=np.ones(9))]
    write_groups(path, groups)
    whole = path.read_bytes()
    found = 0
    for place in range(0, len(whole), 7):
        for damaged in (whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :], whole[:place]):
            path.write_bytes(damaged)
            try:
                same(read_groups(path), groups)
            except DataError:
                found += 1
    assert found > len(whole) / 7


def test_a_thousand_samples_take_no_time(tmp_path):
    """Ten times slower than it should ever be is a mistake; how fast it is is measured elsewhere."""
    groups = [a_group(id, range(1000), samples=8) for id in range(125)]
    for group in groups:
        for sample in group.samples:
            sample.append(list(range(1000)), {LOSS_MASK: 1, ROLLOUT_LOG_PROBS: np.linspace(-1, 0, 1000)})
    started = time.perf_counter()
    back = round_trip(tmp_path, groups)
    assert time.perf_counter() - started < 15
    assert sum(len(s.tokens) for g in back for s in g.samples) == 1000 * 2003
