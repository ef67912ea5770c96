"""Who teaches which sample, where what a teacher says is laid, and a teacher's logits beside the policy's."""

import asyncio

import numpy as np
import pytest
import torch

from miles.config.teacher import TeacherSection
from miles.errors import DataError, TrainError
from miles.plugins import load_plugins
from miles.registry import Registry
from miles.testing import tiny
from miles.training.packing import build_micro_batch
from miles.training.table import Lesson, Table
from miles.training.teachers import TOP_K, TeacherLogits, Teachers
from miles.types import LOSS_MASK, Group, Prompt, Sample

LOGITS = frozenset({"logits"})


class Chat:
    """One token a letter; a conversation is its last message between two marks."""

    def render_text(self, text):
        return [ord(letter) for letter in text]

    def render_prompt(self, messages, tools=None):
        return [1, *self.render_text(messages[-1]["content"]), 2]


class Server:
    """Finds token `t` at position `p` worth `-t - p / 100`."""

    def __init__(self, short=0):
        self.short, self.asked = short, []

    async def score(self, tokens, temperature=1.0):
        self.asked.append((list(tokens), temperature))
        return np.array([-t - p / 100 for p, t in enumerate(tokens)], np.float32)[: len(tokens) - self.short]

    async def score_top(self, tokens, k, temperature=1.0):
        return np.array([[t] * k for t in tokens]), np.array([[-p] * k for p in range(len(tokens))], np.float32)


def sample(i, metadata=None, prompt=(1, 2), response=(7, 8, 9)):
    one = Sample.begin(Prompt(f"s:{i}", "s", text="x", tokens=list(prompt), metadata=metadata or {}), id=i, group_id=i)
    one.append(list(response), {LOSS_MASK: 1})
    one.reward = 0.0
    return one


def teach(teachers, *samples, forward=None):
    table = Table.from_groups([Group(s.id, s.prompt, [s]) for s in samples])
    asyncio.run(teachers.teach(table, {s.id: s for s in samples}, forward))
    return table


def test_each_sample_goes_to_its_teacher():
    async def forward(model, table):
        asked.append((model, table.ids))
        return [np.full(n, {"teacher/math": -1.0, "actor": -2.0}[model], np.float32) for n in table.lengths]

    asked, server = [], Server()
    section = TeacherSection(load={"math": "m", "default": "policy"}, urls={"code": "http://x"}, key="who")
    teachers = Teachers(section, {"code": server}, Chat(), temperature=0.7)
    table = teach(teachers, sample(4, {"who": "math"}), sample(5), sample(6, {"who": "code"}), forward=forward)
    assert asked == [("teacher/math", [4]), ("actor", [5])]
    assert server.asked == [([1, 2, 7, 8, 9], 0.7)]
    columns = table.columns["teacher_log_probs"]
    assert [set(column.tolist()) for column in columns[:2]] == [{-1.0}, {-2.0}]
    assert columns[2].tolist() == pytest.approx([-1, -2.01, -7.02, -8.03, -9.04])
    assert [(lesson.model, lesson.teacher) for lesson in table.lessons] == [
        ("teacher/math", "math"), ("actor", "default"), ("", "code"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("told", "prompt"), [("abcde", [97, 98, 99, 100, 101]), ([{"content": "a"}], [1, 97, 2]), ("", [])]
)
def test_a_teacher_that_is_told_more_speaks_of_the_same_response(told, prompt):
    section = TeacherSection(urls="http://x", prompt_key="hint")
    server = Server()
    table = teach(Teachers(section, {"default": server}, Chat(), 1.0, top_k=2), sample(1, {"hint": told}))
    assert server.asked[0][0] == [*prompt, 7, 8, 9]
    n = len(prompt)
    column = table.columns["teacher_log_probs"][0]
    assert column[2:].tolist() == pytest.approx([-7 - n / 100, -8 - (n + 1) / 100, -9 - (n + 2) / 100])
    ids, log_probs = (table.columns[name][0] for name in TOP_K)
    assert ids[2:].tolist() == [[7, 7], [8, 8], [9, 9]]
    assert log_probs[2:].tolist() == [[-n] * 2, [-n - 1] * 2, [-n - 2] * 2]


def test_what_cannot_be_taught_is_named():
    section = TeacherSection(load="m", prompt_key="hint")
    with pytest.raises(DataError, match="prompt s:3 has no metadata key 'hint'"):
        teach(Teachers(section, {}, Chat(), 1.0), sample(3))
    with pytest.raises(DataError, match="wants the teacher 'code'.*there are default"):
        teach(Teachers(TeacherSection(load="m"), {}, Chat(), 1.0), sample(3, {"opd_teacher": "code"}))
    with pytest.raises(TrainError, match="'default' said 4 things of the 5 tokens of sample 3"):
        teach(Teachers(TeacherSection(urls="http://x"), {"default": Server(short=1)}, Chat(), 1.0), sample(3))


@pytest.fixture(scope="module")
def models():
    """Two teachers of different weights, as backends."""
    registry, config = Registry(load_plugins()), tiny.hf_config("qwen3")
    backend = registry.component("train_backends", "fsdp")
    assert backend
    from miles.builtins.fsdp.backend import FsdpBackend

    contexts = [
        tiny.backend_context(registry, config, tiny.saved("qwen3", seed), role="teacher", temperature=0.5)
        for seed in (0, 1)
    ]
    return {f"teacher/{name}": FsdpBackend(context=c) for name, c in zip("ab", contexts, strict=True)}


def alone(model, tokens):
    """A teacher's logits of one sample, read alone."""
    (outputs,) = model.forward([build_micro_batch([0], [tokens], {})], LOGITS)
    return outputs.logits(0, len(tokens))


def test_logits_of_several_teachers_lie_beside_the_policys(models):
    generator = np.random.default_rng(0)
    tokens = [generator.integers(0, 60, n) for n in (7, 5, 6)]
    longer = np.concatenate([generator.integers(0, 60, 4), tokens[1]])  # 4 more tokens of prompt
    shorter = tokens[2][2:]  # 2 fewer
    lessons = {
        10: Lesson("teacher/a", "a"),
        11: Lesson("teacher/b", "b", longer),
        12: Lesson("teacher/a", "a", shorter),
    }
    batch = build_micro_batch([0, 1, 2], tokens, {})
    batch.sample_ids = [10, 11, 12]
    nothing = build_micro_batch([], [], {})
    logits, of_nothing = TeacherLogits.ask([batch, nothing], lessons, models, sorted(models))
    assert of_nothing(0, 0).shape == (0, alone(models["teacher/a"], tokens[0]).shape[1])
    first, second = models["teacher/a"], models["teacher/b"]
    expected = [alone(first, tokens[0]), alone(second, longer)[4:], alone(first, shorter)]
    expected[2] = torch.cat([torch.zeros(2, expected[2].shape[1]), expected[2]])
    whole = logits(0, 18)
    assert not whole.requires_grad
    starts = torch.zeros(18, dtype=torch.bool)
    starts[[0, 14]] = True  # rows that predict a sample's first token are void
    torch.testing.assert_close(whole[~starts], torch.cat(expected)[~starts], atol=1e-5, rtol=1e-5)
    for size in (1, 4, 5, 18):
        chunks = [logits(start, min(start + size, 18)) for start in range(0, 18, size)]
        torch.testing.assert_close(torch.cat(chunks), whole, atol=1e-5, rtol=1e-5)
