"""Prompts from files: what rows mean, in which order they come, and that any interruption leaves the order alone."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles.api import ConfigError, DataContext, DataError, DataSource
from miles.builtins.files import FileSource
from miles.config import Keys, TaskSet

MESSAGES = [{"role": "user", "content": "hello"}]


class CountingChat:
    """One token a character; counts how often it renders."""

    def __init__(self):
        self.rendered = Counter()

    def render_text(self, text):
        self.rendered[text] += 1
        return [ord(c) for c in text]

    def render_prompt(self, messages, tools=None):
        return self.render_text("|".join(f"{m['role']}:{m['content']}" for m in messages) + str(tools or ""))


def write(path, rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path, count, letter="x"):
    return write(path, [{"input": f"{letter}{i}", "label": i} for i in range(count)])


def source_of(*sets, seed=1, max_prompt_tokens=None, shuffle=False, bad_lines="error"):
    task_sets = [TaskSet(path=s) if isinstance(s, str) else s for s in sets]
    return FileSource(context=DataContext(task_sets, CountingChat(), seed, max_prompt_tokens, shuffle, bad_lines))


def texts(prompts):
    return [prompt.text for prompt in prompts]


# ------------------------------------------------------------------------------------------------------ what rows mean


def test_a_row_becomes_a_prompt(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"q": MESSAGES, "a": "5", "meta": {"level": 2}, "tools": json.dumps(tools), "pictures": None}
    keys = Keys(input="q", label="a", metadata="meta", images="pictures")
    source = source_of(TaskSet(name="maths", path=write(tmp_path / "a.jsonl", [row]), keys=keys))
    [prompt] = source.next_prompts(1)
    assert (prompt.id, prompt.task_set, prompt.text, prompt.messages) == ("maths:0", "maths", None, MESSAGES)
    assert (prompt.label, prompt.metadata, prompt.tools, prompt.images) == ("5", {"level": 2}, tools, None)
    assert prompt.tokens == CountingChat().render_prompt(MESSAGES, tools)
    assert isinstance(source, DataSource)


@pytest.mark.parametrize("asked", [MESSAGES, "what is it?"])
def test_images_are_refused_rather_than_dropped(tmp_path, asked):
    path = write(tmp_path / "a.jsonl", [{"input": asked, "pictures": "p.png"}])
    source = source_of(TaskSet(path=path, keys=Keys(images="pictures")), bad_lines="skip")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the prompt has images.*keys\.images"):
        source.next_prompts(1)
    assert source_of(path).next_prompts(1)  # a column that nobody names is not read


def test_the_forms_of_an_input(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "plain"}, {"input": MESSAGES}, {"input": json.dumps(MESSAGES)}])
    plain, listed, encoded = source_of(path).next_prompts(3)
    assert (plain.text, plain.messages) == ("plain", None)
    assert (listed.text, listed.messages) == (encoded.text, encoded.messages) == (None, MESSAGES)
    [templated] = source_of(TaskSet(path=path, apply_chat_template=True)).next_prompts(1)
    assert (templated.text, templated.messages) == (None, [{"role": "user", "content": "plain"}])


def test_a_conversation_that_the_assistant_ends_is_left_to_the_generate_function(tmp_path):
    messages = [*MESSAGES, {"role": "assistant", "content": "hi"}]
    [prompt] = source_of(write(tmp_path / "a.jsonl", [{"input": messages}])).next_prompts(1)
    assert (prompt.messages, prompt.tokens) == (messages, [])


def test_an_environment_may_do_without_an_input(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"metadata": {"seed": 3}}])
    [prompt] = source_of(TaskSet(path=path, environment="maze")).next_prompts(1)
    assert (prompt.messages, prompt.tokens, prompt.metadata) == ([], [], {"seed": 3})


def test_parquet_rows_mean_the_same(tmp_path):
    rows = [
        {
            "input": [{"role": "system", "content": "s", "name": "n"}, {"role": "user", "content": "u"}],
            "label": 1,
            "metadata": {"a": 1},
        },
        {"input": MESSAGES, "label": 2, "metadata": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = source_of(str(tmp_path / "a.parquet")).next_prompts(2)
    assert (first.messages, first.label, first.metadata) == (rows[0]["input"], 1, {"a": 1})
    assert (second.messages, second.metadata) == (MESSAGES, {})


def test_hub_data_sets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = datasets.Dataset.from_list([{"input": f"q{i}", "label": i} for i in range(4)])
    (tmp_path / "named").mkdir()
    data.to_parquet(tmp_path / "named" / "test.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "dict")
    for name in (f"{tmp_path}/named:test", f"{tmp_path}/saved", f"{tmp_path}/dict:test"):
        source = source_of(f"hub:{name}@[1:3]")
        assert texts(source.every_prompt()) == ["q1", "q2"]
        assert [p.id for p in source.every_prompt()] == ["default:1", "default:2"]
    with pytest.raises(DataError, match="cannot load split 'train'"):
        source_of(f"hub:{tmp_path}/dict")


def test_without_the_datasets_library_a_hub_name_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'miles\[hub\]'"):
        source_of("hub:openai/gsm8k:main:train")


@pytest.mark.parametrize(
    ("rows", "expected"),
    [("@[1:3]", [1, 2]), ("@[:2]", [0, 1]), ("@[-2:]", [3, 4]), ("@[:-3]", [0, 1]), ("@[:]", [0, 1, 2, 3, 4])],
)
def test_a_slice_keeps_the_numbers_of_the_rows(tmp_path, rows, expected):
    prompts = source_of(numbered(tmp_path / "a.jsonl", 5) + rows).every_prompt()
    assert [p.label for p in prompts] == expected
    assert [p.id for p in prompts] == [f"default:{i}" for i in expected]


# -------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{broken\n", "not a JSON object"),
        ("[1]\n", "expected a JSON object, found list"),
        ('{"prompt": "x", "label": 1}\n', "no key 'input'.*the row has 'prompt', 'label'.*--input-key"),
        ('{"input": 3}\n', "'input' must be text .* not int 3"),
        ('{"input": ""}\n', "not empty"),
        ('{"input": "x", "metadata": "nonsense"}\n', "'metadata' is text but not JSON"),
        ('{"input": "x", "tools": {"a": 1}}\n', "'tools' must be a list"),
        (b'{"input": "\xff"}\n'.decode("latin-1"), None),
    ],
)
def test_a_malformed_line_names_file_and_line_or_is_skipped_and_counted(tmp_path, line, why):
    path = tmp_path / "a.jsonl"
    good = json.dumps({"input": "fine"}) + "\n"
    path.write_bytes((good + "\n" + line + good).encode("latin-1"))
    with pytest.raises(DataError, match=rf"(?s)a\.jsonl, line 3: .*{why or ''}"):
        source_of(str(path))
    source = source_of(str(path), bad_lines="skip")
    assert len(source) == 2
    assert [p.id for p in source.next_prompts(2)] == ["default:0", "default:2"]
    assert source.counts == {"too_long": 0, "bad_rows": 1}


def test_a_column_that_was_named_must_be_there(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 1)
    with pytest.raises(DataError, match="no key 'answer', which keys.label names; the row has 'input', 'label'"):
        source_of(TaskSet(path=path, keys=Keys(label="answer")))
    bare = write(tmp_path / "b.jsonl", [{"input": "x"}])
    assert source_of(bare).next_prompts(1)[0].label is None


def test_bad_rows_of_a_table_are_found_when_drawn(tmp_path):
    pq.write_table(pa.table({"input": ["a", "b"], "tools": ["[]", "{"]}), tmp_path / "a.parquet")
    path = str(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1: 'tools' is text but not JSON"):
        source_of(path).next_prompts(2)
    source = source_of(path, bad_lines="skip")
    assert texts(source.next_prompts(2)) == ["a", "a"]
    assert source.counts["bad_rows"] == 1


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("absent.jsonl", "no such file"),
        ("data.csv", r"expected a \.jsonl or \.parquet file"),
        ("a.jsonl@[1-2]", r"a row range is written @\[start:end\]"),
        ("hub:", "expected hub:owner/name"),
        (None, "has no path; give one with --prompt-data"),
    ],
)
def test_a_path_that_cannot_be_read(path, why):
    with pytest.raises(DataError, match=why):
        source_of(TaskSet(path=path))


def test_files_without_rows(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        source_of(str(tmp_path / "broken.parquet"))
    with pytest.raises(DataError, match="has no usable row"):
        source_of(write(tmp_path / "empty.jsonl", ["\n"]))


def test_sets_that_contradict_each_other(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 1)
    with pytest.raises(ConfigError, match="unique"):
        source_of(TaskSet(name="a", path=path), TaskSet(name="a", path=path))
    with pytest.raises(ConfigError, match="no prompts"):
        source_of()


def test_long_prompts_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"input": "a" * n} for n in (1, 5, 2, 9)])
    source = source_of(path, max_prompt_tokens=4)
    assert texts(source.next_prompts(4)) == ["a", "aa", "a", "aa"]
    assert source.counts["too_long"] == 3
    assert len(source) == 4
    assert texts(source.every_prompt()) == ["a", "aa"]
    with pytest.raises(DataError, match="none of the 4 prompts"):
        source_of(path, max_prompt_tokens=0).next_prompts(1)


# ------------------------------------------------------------------------------------------------------------ the order


def test_nothing_is_rendered_twice_and_nothing_before_it_is_drawn(tmp_path):
    source = source_of(numbered(tmp_path / "a.jsonl", 5))
    chat = source.sets[0].context.chat
    source.next_prompts(2)
    assert set(chat.rendered) == {"x0", "x1"}
    source.next_prompts(20)
    assert set(chat.rendered.values()) == {1}


def test_prompts_are_fresh_each_time(tmp_path):
    source = source_of(write(tmp_path / "a.jsonl", [{"input": MESSAGES, "metadata": {"a": [1]}}]))
    first = source.next_prompts(1)[0]
    first.messages.append("spoilt")
    first.metadata["a"].append(2)
    first.tokens.append(0)
    second = source.next_prompts(1)[0]
    assert (second.messages, second.metadata) == (MESSAGES, {"a": [1]})
    assert second.tokens == CountingChat().render_prompt(MESSAGES)


def test_every_epoch_is_another_permutation_that_follows_from_the_seed(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 20)
    drawn = texts(source_of(path, shuffle=True).next_prompts(40))
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == sorted(f"x{i}" for i in range(20))
    assert drawn[:20] != drawn[20:]
    assert drawn == texts(source_of(path, shuffle=True).next_prompts(40))
    assert drawn != texts(source_of(path, shuffle=True, seed=2).next_prompts(40))
    assert texts(source_of(path).next_prompts(20)) == [f"x{i}" for i in range(20)]


def test_sets_take_turns_by_weight(tmp_path):
    a, b, c = (numbered(tmp_path / f"{name}.jsonl", 3, name) for name in "abc")
    sets = [TaskSet(name=n, path=p, weight=w) for n, p, w in (("a", a, 3), ("b", b, 1), ("c", c, 1.5))]
    source = source_of(*sets)
    drawn = [p.task_set for p in source.next_prompts(400)]
    for end in range(1, 401):
        for name, share in (("a", 3 / 5.5), ("b", 1 / 5.5), ("c", 1.5 / 5.5)):
            assert abs(drawn[:end].count(name) - share * end) < 1
    assert len(source) == 9


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(splits=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(-5, 5), shuffle=st.booleans())
def test_any_interruption_leaves_the_sequence_alone(tmp_path, splits, seed, shuffle):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    sets = [
        TaskSet(name="a", path=numbered(a, 7, "a"), weight=2),
        TaskSet(name="b", path=write(b, [{"input": "b" * n} for n in range(1, 6)] + ["{\n"]), weight=0.7),
    ]
    options = {"seed": seed, "shuffle": shuffle, "max_prompt_tokens": 4, "bad_lines": "skip"}
    whole = source_of(*sets, **options)
    expected = whole.next_prompts(sum(splits) + 30)
    drawn, source = [], source_of(*sets, **options)
    for count in splits:
        drawn += source.next_prompts(count)
        state = json.loads(json.dumps(source.state_dict()))
        source = source_of(*sets, **options)
        source.load_state_dict(state)
    drawn += source.next_prompts(30)
    assert drawn == expected
    assert source.counts == whole.counts


def test_a_changed_file_or_set_is_refused_on_resumption(tmp_path):
    path = tmp_path / "a.jsonl"
    state = source_of(numbered(path, 5)).state_dict()
    with pytest.raises(DataError, match="from 5 rows, .* now has 4"):
        source_of(numbered(path, 4)).load_state_dict(state)
    with pytest.raises(DataError, match="task sets default, the config names other"):
        source_of(TaskSet(name="other", path=str(path))).load_state_dict(state)


def test_errors_of_rendering_name_the_row(tmp_path, chat_with):
    context = DataContext(
        [TaskSet(path=write(tmp_path / "a.jsonl", [{"input": MESSAGES}]))], chat_with(None), 0, None, False
    )
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: the tokenizer has no chat template"):
        FileSource(context=context).next_prompts(1)
