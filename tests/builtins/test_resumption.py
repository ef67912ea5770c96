"""A trajectory that is aborted anywhere and goes on under the same weights is the one that nobody touched."""

import asyncio
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles.api import (
    GenerateContext,
    GenerateResult,
    Observation,
    Prompt,
    Sample,
    SamplingParams,
    Status,
    StepResult,
)
from miles.builtins.generate import ENVIRONMENT_STATE, RESTARTED, MultiTurn, single_turn
from miles.config import Spec
from miles.testing import installed, tiny

USER = {"role": "user", "content": "hello"}
SEED = 12


@dataclass
class Dice:
    """An engine whose tokens depend on the seed and the place alone. It ends a request as engines do: at its stop
    tokens and strings once `min_new_tokens` are there, looking at what it said itself."""

    chat: object
    left: float = float("inf")
    """Tokens until everything is aborted."""
    requests: list = field(default_factory=list)

    async def __call__(self, request):
        self.requests.append(request)
        params, said = request.sampling, []
        alphabet = [t for text in "abc=\n" for t in self.chat.render_text(text)] + self.chat.render_text("é")
        while True:
            if self.left <= 0:
                reason = "abort"
                break
            place = len(request.tokens) + len(said)
            drawn = random.Random(f"{request.seed} {place}")
            token = self.chat.end_of_turn_id if drawn.random() < 0.12 else drawn.choice(alphabet)
            free = len(said) + 1 >= params.min_new_tokens
            if token == self.chat.end_of_turn_id and not free:
                token = alphabet[0]
            before = self.chat.decode(said)
            said.append(token)
            self.left -= 1
            text = self.chat.decode(said)
            if free and (token in params.stop_token_ids or any(text.count(s) > before.count(s) for s in params.stop)):
                reason = "stop"
                break
            if len(said) == params.max_new_tokens:
                reason = "length"
                break
        log_probs = [-0.125 * (len(request.tokens) + i) for i in range(len(said))]
        return GenerateResult(said, log_probs, reason, [4] * len(said))


@dataclass
class Tally:
    """Says how many characters it has heard in all; three turns."""

    heard: list = field(default_factory=list)

    async def reset(self, prompt):
        return Observation(())

    async def step(self, action):
        self.heard.append(len(action.text))
        answer = {"role": "user", "content": f"{sum(self.heard)} so far"}
        return StepResult((answer,), float(sum(self.heard)), len(self.heard) >= 3, {f"turn {len(self.heard)}": 1})

    async def close(self):
        self.heard = []


class Remembering(Tally):
    def state_dict(self):
        return {"heard": list(self.heard)}

    def load_state_dict(self, state):
        self.heard = list(state["heard"])


def begun(chat):
    prompt = Prompt("set:0", "set", messages=[USER], tokens=chat.render_prompt([USER]))
    return Sample.begin(prompt, id=5, group_id=1, seed=SEED)


def facts(sample):
    """All that must not depend on aborts."""
    turns = [(turn.start, turn.end, turn.finish_reason, turn.reward) for turn in sample.turns]
    columns = {name: rows.tolist() for name, rows in sample.columns.items()}
    told = {k: v for k, v in sample.metadata.items() if k != RESTARTED}
    return sample.tokens, sample.text, sample.messages, sample.status, turns, columns, told


def finish(generate, context, sample, lives=()):
    """Generate to the end, aborted after as many tokens as each of `lives` says."""
    for tokens in (*lives, float("inf")):
        context.generate.left = tokens
        sample = asyncio.run(generate(context, sample))
        if sample.status is not Status.ABORTED:
            break
    return sample


PARAMS = SamplingParams(max_new_tokens=9)
VARIANTS = {
    "plain": PARAMS,
    "least": replace(PARAMS, min_new_tokens=6),
    "stop strings": replace(PARAMS, max_new_tokens=30, stop=("ab", "=c", "é", "b\na")),
    "stop strings after a while": replace(PARAMS, max_new_tokens=30, min_new_tokens=5, stop=("ab", "=c", "é")),
}


@pytest.mark.parametrize("generate", [single_turn, MultiTurn()], ids=["single", "multi"])
@pytest.mark.parametrize("params", VARIANTS.values(), ids=VARIANTS)
def test_aborted_at_every_token(chat, generate, params):
    params = replace(params, stop_token_ids=chat.stop_token_ids)
    for seed in range(4):

        def context(room=None):
            return GenerateContext(Dice(chat), chat, params, Remembering, max_context_tokens=room)

        def sample(seed=seed):
            return replace_seed(begun(chat), seed)

        whole = finish(generate, context(), sample())
        generated = whole.trainable_tokens
        for at in range(generated):
            assert facts(finish(generate, context(), sample(), [at])) == facts(whole), f"aborted after {at} tokens"
        for room in range(whole.prompt_length + 1, len(whole.tokens) + 1, 3):  # a full context ends it, aborted or not
            cut = finish(generate, context(room), sample())
            assert facts(finish(generate, context(room), sample(), [1, 2])) == facts(cut)


def replace_seed(sample, seed):
    sample.seed = seed
    return sample


@settings(max_examples=40, derandomize=True, deadline=None)
@given(lives=st.lists(st.integers(0, 7), max_size=8), seed=st.integers(0, 99))
def test_aborted_again_and_again(chat, lives, seed):
    params = replace(VARIANTS["stop strings after a while"], stop_token_ids=chat.stop_token_ids)
    context = GenerateContext(Dice(chat), chat, params, Remembering)
    whole = finish(MultiTurn(), context, replace_seed(begun(chat), seed))
    resumed = finish(MultiTurn(), context, replace_seed(begun(chat), seed), lives)
    assert facts(resumed) == facts(whole)
    assert RESTARTED not in resumed.metadata


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_without_a_state_it_begins_again_and_says_so(chat, at):
    params = replace(PARAMS, max_new_tokens=30, stop_token_ids=chat.stop_token_ids)
    context = GenerateContext(Dice(chat), chat, params, Tally)
    whole = finish(MultiTurn(), context, begun(chat))
    again = finish(MultiTurn(), context, begun(chat), [at])
    assert facts(again) == facts(whole)
    assert again.metadata.get(RESTARTED, 0) == (at < whole.trainable_tokens)


def test_what_an_environment_told_before_it_began_again_is_forgotten(chat):
    params = replace(PARAMS, stop_token_ids=chat.stop_token_ids)
    context = GenerateContext(Dice(chat), chat, params, Tally)
    first = finish(MultiTurn(), context, begun(chat))
    context.generate.left = first.turns[1].start - first.prompt_length
    half = asyncio.run(MultiTurn()(context, begun(chat)))
    half.metadata["environment"]["only before"] = 1
    whole = finish(MultiTurn(), context, half)
    assert set(whole.metadata["environment"]) == {"turn 1", "turn 2", "turn 3"}


def test_a_step_that_was_broken_off_begins_again(chat):
    """Cancelled while the environment works: its state is not known."""
    params = replace(PARAMS, stop_token_ids=chat.stop_token_ids)

    class Slow(Remembering):
        async def step(self, action):
            await asyncio.sleep(3600)

    async def cancelled(sample):
        context = GenerateContext(Dice(chat), chat, params, Slow)
        task = asyncio.create_task(MultiTurn()(context, sample))
        while not sample.turns or sample.turns[-1].finish_reason == "abort":
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])

    sample = begun(chat)
    asyncio.run(cancelled(sample))
    assert ENVIRONMENT_STATE not in sample.metadata
    context = GenerateContext(Dice(chat), chat, params, Remembering)
    again = finish(MultiTurn(), context, sample)
    assert facts(again) == facts(finish(MultiTurn(), context, begun(chat)))
    assert again.metadata[RESTARTED] == 1


@pytest.mark.parametrize("generate", [single_turn, MultiTurn()], ids=["single", "multi"])
def test_an_engine_that_raises_leaves_a_turn_to_go_on_with(chat, generate):
    class Lost(Exception):
        pass

    class Down(Dice):
        async def __call__(self, request):
            raise Lost

    params = replace(PARAMS, stop_token_ids=chat.stop_token_ids)
    sample = begun(chat)
    with pytest.raises(Lost):
        asyncio.run(generate(GenerateContext(Down(chat), chat, params, Remembering), sample))
    whole = finish(generate, GenerateContext(Dice(chat), chat, params, Remembering), sample)
    assert facts(whole) == facts(finish(generate, GenerateContext(Dice(chat), chat, params, Remembering), begun(chat)))


@pytest.mark.parametrize("stop", [(), ("a", "e!", "<")], ids=["", "stop strings"])
def test_the_torch_engine_goes_on_where_it_was_cut_off(stop):
    """After every few tokens, again and again: the same tokens, and their log-probs up to floating point."""
    registry, drawn = installed(), random.Random(1)
    sampling = SamplingParams(max_new_tokens=24, stop=stop, stop_token_ids=tuple(range(0, 320, 16)))

    async def main():
        engine_context = tiny.engine_context(registry, tiny.hf_config("qwen3"), tiny.saved("qwen3"))
        engine = registry.build("rollout_engines", Spec(name="torch"), context=engine_context)
        chat = tiny.chat_format(registry)

        async def cut(request):
            room, count = request.sampling.max_new_tokens, drawn.randrange(6)
            if not count:
                return GenerateResult([], [], "abort", [])
            result = await engine.generate(replace(request, sampling=replace(request.sampling, max_new_tokens=count)))
            reason = "abort" if result.finish_reason == "length" and count < room else result.finish_reason
            return replace(result, finish_reason=reason)

        context = GenerateContext(engine.generate, chat, sampling, Remembering, max_context_tokens=256)
        await engine.start()
        try:
            whole, resumed, aborts = await MultiTurn()(context, begun(chat)), begun(chat), -1
            while resumed.status in (Status.PENDING, Status.ABORTED):
                resumed, aborts = await MultiTurn()(replace(context, generate=cut), resumed), aborts + 1
        finally:
            await engine.close()
        return whole, resumed, aborts

    whole, resumed, aborts = asyncio.run(main())
    assert aborts >= 3
    assert resumed.tokens == whole.tokens
    assert (resumed.text, resumed.messages, resumed.status) == (whole.text, whole.messages, whole.status)
    spans = [[(t.start, t.end, t.finish_reason, t.reward) for t in sample.turns] for sample in (resumed, whole)]
    assert spans[0] == spans[1]
    log_probs = [sample.columns["rollout_log_probs"] for sample in (resumed, whole)]
    assert log_probs[0] == pytest.approx(log_probs[1], abs=1e-4)
