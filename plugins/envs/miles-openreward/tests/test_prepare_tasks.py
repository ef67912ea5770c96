"""train_config.yaml becomes prompt files, and task sets that miles takes."""

import json

import pytest
import yaml
from miles_openreward import prepare_tasks

from miles.config.load import resolve
from miles.plugins import load_plugins


@pytest.fixture
def prepare(tmp_path, monkeypatch, capsys):
    """Run the command on a config; its exit code, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)

    def run(config, *flags):
        (tmp_path / "train_config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
        return prepare_tasks.main(list(flags)), capsys.readouterr().err

    return run


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_several_environments_each_with_its_own_rules(prepare, url, tmp_path, monkeypatch):
    monkeypatch.setenv("FLOOR_KEY", "open-sesame-17")
    rules = {"nonterminal_reward": -1.0, "reward_reduction": "max", "min_reward": -1, "max_reward": 2.0, "max_turns": 5}
    counter = {"base_url": url, "splits": ["train", "test"], "num_samples": 4, "secrets": {"floor_key": None}, **rules}
    exam = {"base_url": url, "splits": ["train"], "eval_splits": ["test"]}
    config = {"environments": {"Counter": counter, "Exam": exam}, "thinking": True, "system_prompt_template": "{tools}"}
    assert prepare(config) == (0, "")

    first, *others = rows(tmp_path / "tasks" / "Counter.jsonl")
    assert len(others) == 6, "four of ten, and all three"
    assert first["label"] is None
    assert first["prompt"] == f"Counter train {first['metadata']['index']}"
    assert first["metadata"] == {
        "server_name": "Counter",
        "environment_name": "counter",
        "namespace": None,
        "task_spec": {"goal": first["metadata"]["index"] + 1},
        "variant": "counter",
        "split": "train",
        "index": first["metadata"]["index"],
    }
    assert [row["metadata"]["task_spec"] for row in rows(tmp_path / "tasks" / "Exam.test.jsonl")] == [
        {"goal": 1},
        {"goal": 2},
        {"goal": 3},
    ]

    flags = ["--hf-checkpoint", "x", "--num-rollout", "1", "--data.sets.*.sampling.temperature=0.5"]
    taken = resolve(["tasks/tasks.yaml"], flags, load_plugins(strict=False)).config
    first, second = taken.data.sets
    assert (first.name, first.weight, first.max_turns, first.sampling.temperature) == ("Counter", 7, 5, 0.5)
    assert first.reward[0].options == {k: v for k, v in rules.items() if k != "max_turns"}
    assert first.environment.options == {"base_url": url, "secrets": ["floor_key"], "system_prompt_template": "{tools}"}
    assert (second.weight, second.max_turns, second.reward[0].options) == (10, 20, {"reward_reduction": "sum"})
    (evaluated,) = taken.eval.sets
    assert (evaluated.name, evaluated.path, evaluated.sampling.temperature) == ("Exam_test", "tasks/Exam.test.jsonl", 0)
    assert taken.data.chat_template_kwargs == {"enable_thinking": True}


def test_one_seed_draws_the_same_tasks(prepare, url, tmp_path):
    config = {"environments": {"Counter": {"base_url": url, "num_samples": 3}}}
    drawn = []
    for number, seed in enumerate(("1", "1", "2")):
        prepare(config, "--seed", seed, "--output", str(number))
        drawn.append((tmp_path / str(number) / "Counter.jsonl").read_text())
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_environment_that_does_not_list_its_tasks(prepare, url, tmp_path):
    assert prepare({"environments": {"Huge": {"base_url": url, "num_samples": 5}}}) == (0, "")
    found = rows(tmp_path / "tasks" / "Huge.jsonl")
    indices = [row["metadata"]["index"] for row in found]
    assert len(set(indices)) == 5
    assert max(indices) > 1000
    assert all(row["metadata"]["task_spec"] == {"goal": row["metadata"]["index"]} for row in found)


def test_values_of_secrets_are_refused_and_not_repeated(prepare, url, tmp_path):
    for config in (
        {"environments": {"Counter": {"base_url": url, "secrets": {"openai_api_key": "sk-live"}}}},
        {"environments": {"Counter": {"base_url": url}}, "secrets": {"openai_api_key": "sk-live"}},
    ):
        code, said = prepare(config)
        assert code == 2
        assert "openai_api_key has a value" in said
        assert "OPENAI_API_KEY" in said
        assert "sk-live" not in said
    code, said = prepare('secrets: {openai_api_key: "sk-live}\nenvironments: [')
    assert code == 2
    assert "line 2" in said
    assert "sk-live" not in said
    assert not (tmp_path / "tasks").exists()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("environments: {", "train_config.yaml: "),
        ("{}", "environments: Field required"),
        ("environments: {}", "at least 1 item"),
        ("environments: {Counter: {max_turn: 3}}", "max_turn: Extra inputs are not permitted"),
        ("environments: {Counter: {reward_reduction: median}}", "environments.Counter.reward_reduction"),
        ("environments: {Counter: {base_url: URL, splits: [dev]}}", "has no split 'dev'; it has train, test"),
        ("environments: {Nothing: {base_url: URL}}", "environment 'Nothing' at http"),
        ("environments: {Counter: {base_url: 'http://127.0.0.1:9'}}", "environment 'Counter' at http://127.0.0.1:9: "),
        ("environments: {GeneralReasoning/WhoDunit: {}}", "OPENREWARD_API_KEY is not set"),
        ("environments: {a/b: {base_url: URL}, a.b: {base_url: URL}}", "differ in punctuation alone: a/b, a.b"),
    ],
)
def test_what_is_refused(prepare, url, config, said):
    code, error = prepare(config.replace("URL", url))
    assert code == 2
    assert said in error


def test_a_config_of_the_recipes_of_openreward_is_read_as_it_is(tmp_path):
    path = tmp_path / "train_config.yaml"
    path.write_text(
        "environments:\n"
        "  GeneralReasoning/WhoDunit:\n"
        "    splits: [train]\n    nonterminal_reward: 0.0\n    reward_reduction: sum\n    max_turns: 20\n"
        "secrets:\n  openai_api_key: null\n"
        'system_prompt_template: |\n  Tools:\n  {tools}\n  <tool_call>\n  {{"name": ...}}\n  </tool_call>\n'
        "thinking: false\nopenreward_run_name: mine\n"
    )
    train = prepare_tasks.read_config(path)
    (name,) = train.environments
    made = prepare_tasks.task_set(prepare_tasks.set_name(name), path, train.environments[name], train)
    assert made["name"] == "GeneralReasoning_WhoDunit"
    assert made["environment"]["secrets"] == ["openai_api_key"]
    assert made["environment"]["run_name"] == "mine"
    assert made["reward"] == {"name": "openreward", "nonterminal_reward": 0.0, "reward_reduction": "sum"}
