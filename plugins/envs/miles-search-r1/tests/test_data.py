"""A parquet file in the form of search-r1's NQ and HotpotQA, read as a run reads it, and played to its reward."""

import asyncio

import pyarrow
import pyarrow.parquet
import pytest
from miles_search_r1.environment import question_of
from miles_search_r1.plugin import RewardOptions
from miles_search_r1.reward import SearchR1Reward, targets_in

from miles.api import DataContext, Sample
from miles.builtins.files import FileSource
from miles.config import Keys, TaskSet
from miles.testing import tiny
from miles.testing.contract import installed

ASKED = (
    "Answer the given question. You must put the answer inside <answer> and </answer>, for example, "
    "<answer> Beijing </answer>. Question: total number of death row inmates in the us?\n"
)


@pytest.fixture
def parquet(tmp_path):
    row = {
        "id": "test_0",
        "data_source": "nq",
        "prompt": [{"role": "user", "content": ASKED}],
        "ability": "fact-reasoning",
        "reward_model": {"ground_truth": {"target": ["2,718", "about 2700"]}, "style": "rule"},
        "extra_info": {"index": 0, "split": "test"},
    }
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    return path


def source_of(path):
    task_set = TaskSet(name="nq", path=str(path), keys=Keys(input="prompt", label="reward_model"))
    return FileSource(context=DataContext([task_set], tiny.chat_format(installed()), 0, None, False))


def test_rows_of_nq(parquet):
    [prompt] = source_of(parquet).next_prompts(1)
    assert prompt.messages == [{"role": "user", "content": ASKED}]
    assert prompt.tokens == tiny.chat_format(installed()).render_prompt(prompt.messages)
    assert targets_in(prompt) == ["2,718", "about 2700"]
    assert question_of(prompt) == "total number of death row inmates in the us?"


@pytest.mark.parametrize(("answer", "right"), [("2718", 1), ("About 2700.", 1), ("Beijing", 0)])
def test_their_labels_are_judged(parquet, answer, right):
    [prompt] = source_of(parquet).next_prompts(1)
    sample = Sample.begin(prompt, id=0, group_id=0)
    sample.messages.append({"role": "assistant", "content": f"<answer>{answer}</answer>"})
    assert asyncio.run(SearchR1Reward(RewardOptions()).score(sample))["exact_match"] == right
