"""Generate functions in the style of slime and Miles, unchanged: what they get, what becomes of what they return."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from miles.api import (
    ConfigError,
    EngineLostError,
    GenerateRequest,
    GenerateResult,
    HookError,
    PluginLoadError,
    RolloutError,
    Sample,
    Status,
)

VERSION = 3
"""Of `miles.testing.generating.Script`."""


def columns_of(sample: Sample) -> list[tuple[int, int, float, int]]:
    """Token, mask, log-prob and version of each token of the response."""
    names = ("loss_mask", "rollout_log_probs", "weight_version")
    rows = [sample.columns[name][sample.prompt_length :].tolist() for name in names]
    return list(zip(sample.tokens[sample.prompt_length :], *rows, strict=True))


def said(script, chat, *texts: str) -> list[int]:
    """Tokens of answers that stop by themselves."""
    return [token for text in texts for token in [*chat.render_text(text), chat.stop_token_ids[0]]]


@pytest.mark.parametrize(
    ("flags", "of_prompt", "expected"),
    [
        ([], {"text": "hello"}, "hello"),
        (
            [],
            {"text": None, "messages": [{"role": "user", "content": "hello"}]},
            [{"role": "user", "content": "hello"}],
        ),
        (["--apply-chat-template"], {"text": "hello"}, "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_the_prompt_is_what_upstream_makes_of_the_row(bench, configured, flags, of_prompt, expected):
    """Rendered text with --apply-chat-template, else what stands in the data."""
    configured(*flags)
    messages = of_prompt.get("messages") or ([{"role": "user", "content": "hello"}] if flags else None)
    tokens = bench.chat.render_prompt(messages) if messages else bench.chat.render_text("hello")
    tools = [{"type": "function", "function": {"name": "add"}}]
    sample = bench.sample(**{**of_prompt, "tokens": tokens, "tools": tools, "metadata": {"level": 3}})
    made = bench.generate("several.notes_what_it_gets", bench.script(), sample)
    assert made.metadata["given"] == [expected, "hello", [], 0, 1, 5, None, "pending"]
    assert (made.metadata["level"], made.metadata["tools"]) == (3, tools)
    assert made.tokens[: made.prompt_length] == tokens
    assert made.prompt is sample.prompt
    assert sample.metadata == {}


def test_tools_between_turns(bench):
    """Retool: the prompt becomes another, the tool's tokens have mask 0, no log-prob and no version."""
    script = bench.script(("add 2 3", "stop"), ("it is 5", "stop"))
    sample = bench.generate("retool.generate", script)
    asked = bench.chat.render_text("Tools: add.\nhello")
    first, second = said(script, bench.chat, "add 2 3"), said(script, bench.chat, "it is 5")
    result = bench.chat.render_text("\n<result>5</result>\n")
    assert sample.tokens == asked + first + result + second
    assert sample.prompt_length == len(asked)
    assert [r.tokens for r in script.requests] == [asked, asked + first + result]
    expected = [(token, 1, -0.25 * (1 + i), VERSION) for i, token in enumerate(first)]
    expected += [(token, 0, 0.0, -1) for token in result]
    expected += [(token, 1, -0.25 * (1 + len(first) + i), VERSION) for i, token in enumerate(second)]
    assert columns_of(sample) == expected
    start = len(asked)
    spans = [(start, start + len(first)), (len(sample.tokens) - len(second), len(sample.tokens))]
    assert [(turn.start, turn.end, turn.finish_reason) for turn in sample.turns] == [(*span, "stop") for span in spans]
    assert sample.status is Status.COMPLETED
    assert sample.metadata["slime_function"]["further"] == {"tool_call_count": 1}


def test_text_in_finds_its_answers_again(bench):
    """Search-r1 posts text: the server's tokens are looked for where the function put them."""
    script = bench.script(("<search>tea</search>", "stop"), ("<answer>hot</answer>", "stop"))
    sample = bench.generate("search.generate", script)
    assert sample.metadata.get("slime_function", {}) == {}
    assert sample.text.count("what is known of tea") == 1
    mask = sample.loss_mask
    assert len(sample.turns) == 2
    assert all(mask[turn.start : turn.end].all() for turn in sample.turns)
    assert mask.sum() == sum(turn.end - turn.start for turn in sample.turns)
    assert ((sample.columns["weight_version"] == VERSION) == (mask > 0)).all()
    assert [r.sampling.stop for r in script.requests] == [("</search>", "</answer>")] * 2


def test_log_probs_are_the_engines(bench):
    """On the torch engine: what went over HTTP and through the function is bit for bit what the engine says."""
    heard = []

    async def work(engine):
        async def generate(request: GenerateRequest):
            heard.append((request, await engine.generate(request)))
            return heard[-1][1]

        function = bench.build("generate_functions", path="single.generate")
        return await function(bench.context(generate, max_new_tokens=12), bench.sample("hello you"))

    sample = bench.on_torch(work)
    ((request, result),) = heard
    assert request.seed == 99
    assert request.tokens == bench.chat.render_text("hello you")
    assert sample.tokens == request.tokens + result.tokens
    told = sample.columns["rollout_log_probs"][sample.prompt_length :]
    assert told.tobytes() == np.asarray(result.log_probs, np.float32).tobytes()
    assert sample.columns["weight_version"][sample.prompt_length :].tolist() == result.weight_versions


@pytest.mark.parametrize("path", ["single.generate", "slime.rollout.sglang_rollout.generate"])
@pytest.mark.parametrize("model", ["llama", "qwen3_moe"])
def test_a_sample_is_that_of_the_built_in_function(bench, configured, model, path):
    """Same seed, same prompt: the same tokens, columns and turns, expert choices included."""
    configured(model=model)

    async def work(engine):
        from miles.config import Spec
        from miles.testing.contract import installed

        context = bench.context(engine.generate, max_new_tokens=12, routed_experts=model == "qwen3_moe")
        built_in = installed().build("generate_functions", Spec(name="single_turn"))
        return [
            await function(context, bench.sample("hello you"))
            for function in (built_in, bench.build("generate_functions", path=path))
        ]

    expected, sample = bench.on_torch(work, model)
    assert (sample.tokens, sample.prompt_length) == (expected.tokens, expected.prompt_length)
    assert (sample.status, sample.text) == (expected.status, expected.text)
    assert [(t.start, t.end, t.finish_reason) for t in sample.turns] == [
        (t.start, t.end, t.finish_reason) for t in expected.turns
    ]
    assert sample.specs == expected.specs
    assert ("rollout_routed_experts" in sample.specs) == (model == "qwen3_moe")
    for name, rows in expected.columns.items():
        assert sample.columns[name].tobytes() == rows.tobytes(), name


def test_experts_of_turns(bench, configured):
    """Tools between turns: rows of both answers, each of the pass that drew its token."""
    configured(model="qwen3_moe")
    results = []

    async def work(engine):
        async def generate(request):
            results.append(await engine.generate(request))
            return results[-1]

        function = bench.build("generate_functions", path="several.two_turns")
        return await function(bench.context(generate, max_new_tokens=6, routed_experts=True), bench.sample())

    sample = bench.on_torch(work, "qwen3_moe")
    rows = sample.columns["rollout_routed_experts"]
    assert len(rows) == len(sample.tokens) - 1
    first, second = (one.routed_experts for one in results)
    assert (rows[: len(first)] == first).all()
    assert (rows[len(first) :] == second[len(first) :]).all()


def test_the_same_seed_gives_the_same_sample(bench):
    async def work(engine):
        function = bench.build("generate_functions", path="several.solvers")
        context = bench.context(engine.generate, max_new_tokens=8)
        return [[one.tokens for one in await function(context, bench.sample())] for _ in range(2)]

    once, again = bench.on_torch(work)
    assert once[0] != once[1], "two answers to one prompt are the same"
    assert sorted(once) == sorted(again)


def test_a_list_are_siblings(bench):
    made = bench.generate("several.solvers", bench.script())
    assert [(one.id, one.rollout_id, one.group_id) for one in made] == [(5, 5, 1)] * 2
    assert [one.reward for one in made] == [0.25, None]
    assert len(bench.generate("several.solvers", bench.script(), evaluation=True)) == 1


def test_one_loop_for_all_runs(bench):
    """What a module makes at import belongs to one loop: here to the functions' own, whichever loop the run is in."""

    async def many():
        function = bench.build("generate_functions", path="several.solvers")
        return await asyncio.gather(*(function(bench.context(bench.script()), bench.sample()) for _ in range(6)))

    for _ in range(2):
        assert len(asyncio.run(many())) == 6


def test_miles_newer_signature(bench, configured):
    made = bench.generate("several.with_input", bench.script(), evaluation=True)
    assert made.metadata["evaluation"] is True
    assert made.metadata["tools"] == "hammer"
    configured(
        "--custom-generate-function-path", "several.with_input", "--data.sets.default.generate.args.tools_of_mine=saw"
    )
    assert bench.generate("several.with_input", bench.script()).metadata["tools"] == "saw"


def test_without_a_path_it_is_upstreams_single_turn(bench):
    sample = bench.generate("", bench.script(("hello you", "stop")))
    assert sample.text == "hello you"
    assert [row[1] for row in columns_of(sample)] == [1] * sample.response_length


def test_hooks_see_each_sample_before_it_is_judged(bench):
    options = {"sample_hooks": ["several.note_step", "several:double_reward"]}
    made = bench.generate("several.solvers", bench.script(), options=options)
    assert [one.metadata["hooked"] for one in made] == [[None, False]] * 2


def test_a_function_that_blocks_and_asks_by_itself(bench):
    """Its request says nothing of its sample, so the versions are those that the function has kept."""
    sample = bench.generate("several.blocking", bench.script(("abc", "stop")))
    tokens = said(None, bench.chat, "abc")
    assert columns_of(sample) == [(token, 1, -0.25 * (1 + i), VERSION) for i, token in enumerate(tokens)]
    assert [(turn.start, turn.end) for turn in sample.turns] == [(sample.prompt_length, len(sample.tokens))]


def test_what_else_can_be_asked(bench):
    """What is known of the model, and OpenAI's API; nothing that would change the engines of a run."""
    made = bench.generate("several.looks_around", bench.script(("hello", "stop")))
    assert made.metadata["model"]["model_type"] == "llama"
    assert made.metadata["said"]["choices"][0]["message"]["content"] == "hello"
    assert made.metadata["models"]["data"][0]["max_model_len"] == 256
    assert made.metadata["refused"] == [404] * 4


def test_what_the_server_refuses_is_not_asked_again(bench):
    with pytest.raises(Exception, match="regex is not supported by this server"):
        bench.generate("several.asks_wrongly", bench.script())


# --------------------------------------------------------------------------------------------------- what is returned


def test_a_column_of_another_length_is_named(bench):
    with pytest.raises(RolloutError, match=r"loss_mask has 8 entries, and response_length is 9"):
        bench.generate("several.short_column", bench.script(("it is 5!", "stop")))


def test_a_log_prob_that_is_none_is_named(bench):
    """It would make the loss of its whole batch NaN."""
    with pytest.raises(RolloutError, match=r"rollout_log_probs holds what is no finite number"):
        bench.generate("several.unknown_log_prob", bench.script(("it is 5!", "stop")))


def test_what_is_no_sample_is_no_samples_fault(bench):
    with pytest.raises(HookError, match=r"several.nothing .*several.py:\d+\) returned NoneType"):
        bench.generate("several.nothing", bench.script())


def test_a_removed_sample_trains_nothing(bench):
    sample = bench.generate("several.removed", bench.script())
    assert not sample.loss_mask.any()
    assert sample.status is Status.COMPLETED


def test_columns_that_a_function_leaves_out(bench):
    """All of the response is trained on; log-probs and versions are known from the requests."""
    sample = bench.generate("several.without_columns", bench.script(("abc", "stop")))
    tokens = said(None, bench.chat, "abc")
    assert columns_of(sample) == [(token, 1, -0.25 * (1 + i), VERSION) for i, token in enumerate(tokens)]


def test_an_answer_that_was_cut_by_hand(bench):
    """Nobody knows where a part of an answer came from, if others follow it; its version is the oldest there was."""
    sample = bench.generate("several.cut_by_hand", bench.script(("abcdef", "stop")))
    assert [row[1:] for row in columns_of(sample)] == [
        (1, -0.25, VERSION), (1, -0.5, VERSION), (1, -0.75, VERSION), (0, 0.0, -1), (0, 0.0, -1),
    ]  # fmt: skip
    assert [(turn.start, turn.end) for turn in sample.turns] == [(sample.prompt_length, sample.prompt_length + 3)]


# ------------------------------------------------------------------------------------------------------ aborts, limits


def test_an_aborted_sample_goes_on_with_partial_rollout(bench, configured):
    configured(
        "--custom-generate-function-path", "single.generate", "--data.sets.default.generate.args.partial_rollout=true"
    )
    script = bench.script(("hel", "abort"), ("lo", "stop"))
    aborted = bench.generate("single.generate", script)
    assert aborted.status is Status.ABORTED
    assert aborted.response_length == len(bench.chat.render_text("hel"))
    whole = bench.generate("single.generate", script, aborted)
    assert whole.status is Status.COMPLETED
    assert script.requests[1].tokens == aborted.tokens
    assert script.requests[1].sampling.max_new_tokens == 64 - aborted.response_length
    assert [turn.finish_reason for turn in whole.turns] == ["abort", "stop"]
    assert (whole.columns["weight_version"][whole.prompt_length :] == VERSION).all()
    assert "restarted" not in whole.metadata


def test_it_begins_again_without(bench):
    script = bench.script(("hel", "abort"), ("lo", "stop"))
    aborted = bench.generate("retool.generate", script)
    assert (aborted.status, aborted.response_length) == (Status.ABORTED, 0)
    assert bench.generate("retool.generate", script, aborted).status is Status.COMPLETED
    again = bench.script(("hel", "abort"), ("lo", "stop"))
    whole = bench.generate("single.generate", again, bench.generate("single.generate", again))
    assert whole.metadata["restarted"] == 1
    assert whole.text == "lo"


def test_new_weights_in_the_middle_of_an_answer(bench):
    """Nothing of it reaches the function but one answer; every token has its own version."""
    script, pieces = bench.script(), [("abc", 3, True), ("de", 4, False)]

    async def engine(request):
        text, version, interrupted = pieces.pop(0)
        tokens = bench.chat.render_text(text)
        script.requests.append(request)
        reason = "abort" if interrupted else "stop"
        return GenerateResult(tokens, [-0.5] * len(tokens), reason, [version] * len(tokens), interrupted=interrupted)

    sample = bench.generate("single.generate", engine)
    assert sample.columns["weight_version"][sample.prompt_length :].tolist() == [3, 3, 3, 4, 4]
    assert (sample.text, sample.status, len(sample.turns)) == ("abcde", Status.COMPLETED, 1)
    assert script.requests[1].tokens == script.requests[0].tokens + bench.chat.render_text("abc")


def test_no_request_has_more_tokens_than_there_is_room(bench):
    script = bench.script(("hello you", "stop"))
    sample = bench.generate("search.generate", script, max_context_tokens=len(bench.chat.render_text("hello")) + 4)
    assert script.requests[0].sampling.max_new_tokens == 4
    assert sample.status is Status.TRUNCATED


def test_what_the_engine_raises_is_raised(bench):
    """Whatever the function would make of the reply: a lost engine is the run's trouble, no sample's fault."""

    async def lost(request):
        raise EngineLostError("engine 0 is gone")

    with pytest.raises(EngineLostError, match="engine 0 is gone"):
        bench.generate("search.generate", lost)


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_paths_are_checked_when_the_run_is_built(bench):
    with pytest.raises(PluginLoadError, match="did you mean 'generate'"):
        bench.build("generate_functions", path="single.generat")
    with pytest.raises(ConfigError, match="names no function"):
        bench.build("generate_functions", path="single")
    with pytest.raises(ConfigError, match=r"takes \(parser\)|expected"):
        bench.build("generate_functions", path="judges.any_right")


@pytest.mark.parametrize("kind", ["generate_functions", "rewards", "sample_filters"])
def test_paths_are_checked_before_anything_is_built(lab, kind):
    options = lab.installed().component(kind, "slime_function").options
    options(path="retool.generate").preflight()
    with pytest.raises(PluginLoadError, match="did you mean 'generate'"):
        options(path="retool.generat").preflight()


def test_an_unknown_setting_is_named(bench):
    with pytest.raises(AttributeError, match=r"args.flux_capacitor: no setting .*--custom-config-path"):
        bench.generate("several.asks_for_what_nobody_knows", bench.script())
