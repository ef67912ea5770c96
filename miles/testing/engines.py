"""The contract of rollout engines, on a model of a few thousand parameters."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from miles.contexts import EngineContext
from miles.errors import MilesError
from miles.protocols import RolloutEngine
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.types import GenerateRequest, GenerateResult, SamplingParams

PROMPT = [5, 17, 3, 200]
SLEEPS = (frozenset({"kv_cache"}), frozenset({"weights", "kv_cache", "graphs"}))


def request(tokens: Any = PROMPT, seed: int = 0, id: str = "r", **sampling: Any) -> GenerateRequest:
    return GenerateRequest(id, list(tokens), SamplingParams(**{"max_new_tokens": 8, **sampling}), seed=seed)


class RolloutEngineContract(ComponentContract):
    """Generation, scoring, control, and the receiving half of weight syncs.

    Example:
        class TestTorch(RolloutEngineContract):
            name = "torch"

    Needs the bridge of `model_type`: `pip install miles-llama`. An engine that generates nothing is only asked to say
    so, and to take part in everything else.
    """

    kind = "rollout_engines"
    model_type: ClassVar[str] = "llama"
    transport: ClassVar[str] = "inprocess"
    """The weight sync by which these tests hand it weights; see `send`."""
    patience: ClassVar[float] = 60.0
    """Seconds after which something that should have ended has hung."""
    seeded: ClassVar[bool] = True
    """A request's seed decides its tokens, whatever else the engine does."""

    def context(self) -> EngineContext:
        return tiny.engine_context(installed(), tiny.hf_config(self.model_type), tiny.saved(self.model_type))

    async def send(self, engine: RolloutEngine, version: int, weights: Mapping[str, Tensor]) -> None:
        """Hand an engine a checkpoint's tensors. Override it for a transport whose payload is another."""
        await engine.receive(self.transport, version, tiny.groups_of(weights))

    def weights(self, seed: int = 0) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(tiny.saved(self.model_type, seed) / "model.safetensors")

    def expected(self, tokens: list[int], seed: int = 0, temperature: float = 1.0) -> np.ndarray:
        """Log-probabilities by transformers, of the model drawn from a seed."""
        lm = tiny.model(tiny.hf_config(self.model_type), seed)
        return tiny.log_probs_of(lm, tokens, temperature).numpy()

    def use(self, work: Callable[[Any], Awaitable[Any]], generating: bool = True) -> Any:
        """Start an engine, work with it, close it."""
        if generating and not self.build().generates:
            pytest.skip("generates nothing")

        async def main() -> Any:
            engine = self.build()
            await engine.start()
            try:
                return await asyncio.wait_for(work(engine), self.patience)
            finally:
                await engine.close()

        return asyncio.run(main())

    # ------------------------------------------------------------------------------------------------- what it says

    def test_it_says_whether_it_generates(self) -> None:
        """Task sets without a reward are refused for engines that give responses; `provides` tells it before the
        engine exists, `generates` after."""
        assert ("responses" in self.component.provides) == self.build().generates
        assert isinstance(self.build().accepts, frozenset)

    def test_an_engine_that_generates_nothing_says_so(self) -> None:
        """An EngineError, and not an empty answer that would be trained on."""

        async def work(engine: Any) -> None:
            if engine.generates:
                pytest.skip("generates")
            with pytest.raises(MilesError):
                await engine.generate(request())
            with pytest.raises(MilesError):
                await engine.score(PROMPT)

        self.use(work, generating=False)

    def test_every_way_of_control_can_be_taken(self) -> None:
        """The loop pauses, sleeps, wakes and flushes engines without asking what they are, also when nothing runs."""

        async def work(engine: Any) -> None:
            for mode in ("abort", "retract", "in_place"):
                await engine.pause(mode)
                await engine.resume()
            await engine.abort()
            await engine.abort("nobody")
            await engine.flush_cache()
            for parts in SLEEPS:
                await engine.sleep(parts)
                await engine.wake(parts)
            health = await engine.health()
            assert (health.running, health.waiting, health.asleep) == (0, 0, frozenset())

        self.use(work, generating=False)

    def test_closing(self) -> None:
        """Twice, and without a start: it happens on every way out of a run."""

        async def main() -> None:
            untouched, engine = self.build(), self.build()
            await untouched.close()
            await engine.start()
            await engine.close()
            await engine.close()
            if engine.generates:
                with pytest.raises(MilesError):
                    await asyncio.wait_for(engine.generate(request()), self.patience)

        asyncio.run(main())

    # -------------------------------------------------------------------------------------------- tokens and numbers

    def test_scores_are_the_models(self) -> None:
        """What transformers says of the same tokens at the same temperature; 0 at position 0. A temperature it cannot
        score at is an error."""

        async def work(engine: Any) -> None:
            for temperature in (1.0, 0.6):
                try:
                    found = await engine.score(PROMPT * 3, temperature)
                except MilesError:
                    assert temperature != 1.0, "cannot score at temperature 1"
                    continue
                assert found.dtype == np.float32
                assert found[0] == 0
                np.testing.assert_allclose(found, self.expected(PROMPT * 3, 0, temperature), atol=2e-4)

        self.use(work)

    def test_log_probs_of_generated_tokens_are_their_scores(self) -> None:
        """The trainer's ratios are made of them: one column, one temperature, one token off, and nothing is learnt."""

        async def work(engine: Any) -> None:
            for temperature in (1.0, 0.6):
                result = await engine.generate(request(temperature=temperature, max_new_tokens=12))
                _check(result)
                expected = self.expected([*PROMPT, *result.tokens], 0, temperature)[len(PROMPT) :]
                np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)

        self.use(work)

    def test_greedy_takes_the_likeliest_token(self) -> None:
        """Temperature 0; its log-probs are those of the model at temperature 1."""

        async def work(engine: Any) -> None:
            result = await engine.generate(request(temperature=0.0))
            lm = tiny.model(tiny.hf_config(self.model_type))
            tokens = list(PROMPT)
            for token in result.tokens:
                with torch.no_grad():
                    best = lm(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()
                assert token == best
                tokens.append(token)
            np.testing.assert_allclose(result.log_probs, self.expected(tokens)[len(PROMPT) :], atol=2e-4)

        self.use(work)

    def test_a_seed_decides_the_tokens(self) -> None:
        """A request gives the same answer alone and among others: a run can be repeated. Siblings differ by seed."""
        if not self.seeded:
            pytest.skip("its draws depend on what else runs")

        async def work(engine: Any) -> None:
            alone = [await engine.generate(request(seed=seed, id=f"a{seed}")) for seed in range(4)]
            asked = [request(seed=seed, id=f"b{seed}") for seed in range(4)]
            others = [request([9, 9, seed], seed=seed, id=f"o{seed}", max_new_tokens=3) for seed in range(4)]
            together = (await asyncio.gather(*(engine.generate(r) for r in [*others, *asked])))[4:]
            assert [r.tokens for r in together] == [r.tokens for r in alone]
            assert len({tuple(r.tokens) for r in alone}) > 1, "seeds make no difference"

        self.use(work)

    def test_responses_end_where_they_should(self) -> None:
        """After exactly `max_new_tokens` (`length`); after a stop token or string, which stays (`stop`)."""

        async def work(engine: Any) -> None:
            whole = await engine.generate(request(seed=3))
            assert (whole.finish_reason, len(whole.tokens)) == ("length", 8)
            stop = whole.tokens[4]
            first = whole.tokens.index(stop)
            by_token = await engine.generate(request(seed=3, temperature=1.0, stop_token_ids=(stop,)))
            assert by_token.finish_reason == "stop"
            assert by_token.tokens[-1] == stop, "the stop token is part of what the model said"
            if self.seeded:
                assert by_token.tokens == whole.tokens[: first + 1]

        self.use(work)

    def test_a_prefix_that_is_cached_changes_nothing(self) -> None:
        """A second turn, and the siblings of a group, prefill only what is new; the answer is the same."""

        async def work(engine: Any) -> None:
            first = await engine.generate(request(seed=1))
            longer = [*PROMPT, *first.tokens, 7, 8]
            cached = await engine.generate(request(longer, seed=2))
            await engine.flush_cache()
            fresh = await engine.generate(request(longer, seed=2))
            assert fresh.cached_tokens == 0
            assert cached.cached_tokens <= len(longer)
            if self.seeded:
                assert cached.tokens == fresh.tokens
            for result in (cached, fresh):
                expected = self.expected([*longer, *result.tokens])[len(longer) :]
                np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)

        self.use(work)

    def test_a_request_it_cannot_serve_is_refused(self) -> None:
        """No tokens, tokens outside the vocabulary, more than the context holds: an error for this request, and the
        others go on."""

        async def work(engine: Any) -> None:
            good = asyncio.ensure_future(engine.generate(request(max_new_tokens=20)))
            too_long = [1] * (tiny.DIMENSIONS["max_position_embeddings"] + 1)
            for tokens in ([], [tiny.DIMENSIONS["vocab_size"]], [-1], too_long):
                with pytest.raises(MilesError):
                    await engine.generate(request(tokens))
            assert len((await good).tokens) == 20

        self.use(work)

    def test_a_stream_is_the_answer_in_pieces(self) -> None:
        """Put together they are what `generate` returns; only the last one says how it finished."""

        async def work(engine: Any) -> None:
            if not hasattr(engine, "stream"):
                pytest.skip("has no streams")
            pieces = [piece async for piece in engine.stream(request(seed=3, max_new_tokens=60))]
            for piece in pieces:
                _check(piece, last=piece is pieces[-1])
            if self.seeded:
                whole = await engine.generate(request(seed=3, max_new_tokens=60))
                assert [token for piece in pieces for token in piece.tokens] == whole.tokens
                assert pieces[-1].finish_reason == whole.finish_reason
            async for _ in (left := engine.stream(request(max_new_tokens=200))):
                break
            await left.aclose()
            assert len((await engine.generate(request())).tokens) == 8

        self.use(work)

    # ------------------------------------------------------------------------------------------------------- control

    def test_an_abort_ends_one_or_all(self) -> None:
        """On return they have ended, with what they have."""

        async def work(engine: Any) -> None:
            tasks = [
                asyncio.ensure_future(engine.generate(request(seed=i, id=f"r{i}", max_new_tokens=200)))
                for i in range(3)
            ]
            await asyncio.sleep(0)
            await engine.abort("r1")
            await _turns_of_the_loop()
            assert tasks[1].done(), "on return from abort a request goes on"
            await engine.abort()
            await _turns_of_the_loop()
            assert all(task.done() for task in tasks), "on return from abort requests go on"
            for task in tasks:
                _check(task.result())
                assert task.result().finish_reason == "abort" or len(task.result().tokens) == 200

        self.use(work)

    def test_a_pause_stops_and_a_resume_goes_on(self) -> None:
        """Nothing ends while it is paused; afterwards every token is what it would have been."""
        if not self.seeded:
            pytest.skip("its draws depend on what else runs")

        async def work(engine: Any) -> None:
            expected = await engine.generate(request(max_new_tokens=60))
            for mode in ("retract", "in_place"):
                task = asyncio.ensure_future(engine.generate(request(max_new_tokens=60)))
                await asyncio.sleep(0.005)
                await engine.pause(mode)
                late = asyncio.ensure_future(engine.generate(request([1, 2])))
                finished = task.done()
                await asyncio.sleep(0.03)
                assert task.done() == finished, f"a request ended while the engine was paused ({mode})"
                assert not late.done(), "a new request was served while the engine was paused"
                await engine.resume()
                assert (await task).tokens == expected.tokens, mode
                assert len((await late).tokens) == 8

        self.use(work)

    def test_a_pause_can_abort(self) -> None:
        """What runs ends at once; what comes later waits."""

        async def work(engine: Any) -> None:
            task = asyncio.ensure_future(engine.generate(request(max_new_tokens=200)))
            while not task.done() and not (await engine.health()).running:
                await asyncio.sleep(0)
            await engine.pause("abort")
            _check(await task)
            await engine.resume()
            assert len((await engine.generate(request())).tokens) == 8

        self.use(work)

    def test_asleep_it_refuses_and_awake_it_serves(self) -> None:
        """A request must not find half a model; after waking and a sync everything is as before."""

        async def work(engine: Any) -> None:
            before = await engine.score(PROMPT)
            for parts in SLEEPS:
                await engine.pause("abort")
                await engine.sleep(parts)
                assert (await engine.health()).asleep >= parts & {"kv_cache", "weights"}
                await engine.wake(parts)
                if "weights" in parts:
                    await self.send(engine, 1, self.weights())
                await engine.resume()
                assert (await engine.health()).asleep == frozenset()
                np.testing.assert_allclose(await engine.score(PROMPT), before, atol=1e-5)
                assert len((await engine.generate(request())).tokens) == 8

        self.use(work)

    # ------------------------------------------------------------------------------------------------------- weights

    def test_new_weights_are_served_under_their_version(self) -> None:
        """On return it serves them: scores, tokens and their versions are the new ones, and no cache of the old ones
        is left. The loop, and every correction for staleness, rely on the number."""

        async def work(engine: Any) -> None:
            await engine.generate(request(seed=1))
            for version, seed in ((3, 1), (4, 0)):
                await self.send(engine, version, self.weights(seed))
                assert (await engine.health()).weight_version == version
                np.testing.assert_allclose(await engine.score(PROMPT), self.expected(PROMPT, seed), atol=2e-4)
                result = await engine.generate(request(seed=1))
                assert set(result.weight_versions) == {version}
                expected = self.expected([*PROMPT, *result.tokens], seed)[len(PROMPT) :]
                np.testing.assert_allclose(result.log_probs, expected, atol=2e-4)

        self.use(work)

    def test_weights_are_a_copy(self) -> None:
        """The trainer goes on changing its own."""

        async def work(engine: Any) -> None:
            weights = {name: tensor.clone() for name, tensor in self.weights().items()}
            await self.send(engine, 1, weights)
            before = await engine.score(PROMPT)
            for tensor in weights.values():
                tensor.zero_()
            np.testing.assert_array_equal(await engine.score(PROMPT), before)

        self.use(work)

    def test_half_a_model_is_never_served(self) -> None:
        """A sync that breaks off is an error; afterwards it serves the old weights or nothing, and the next sync
        repairs it."""

        async def work(engine: Any) -> None:
            await self.send(engine, 1, self.weights())
            old = await engine.score(PROMPT)
            half = dict(list(self.weights(1).items())[: len(self.weights(1)) // 2])
            with pytest.raises(Exception):  # noqa: B017 (any error will do; a mixture will not)
                await self.send(engine, 2, half)
            try:
                served = await engine.score(PROMPT)
            except MilesError:
                served = None
            if served is not None:
                np.testing.assert_array_equal(served, old)
                assert (await engine.health()).weight_version == 1, "it serves old weights under the new version"
            await self.send(engine, 3, self.weights(1))
            np.testing.assert_allclose(await engine.score(PROMPT), self.expected(PROMPT, 1), atol=2e-4)

        self.use(work)

    def test_a_transport_it_does_not_accept_is_refused(self) -> None:
        """`accepts` says which it understands."""

        async def work(engine: Any) -> None:
            with pytest.raises(MilesError):
                await engine.receive("no such transport", 1, tiny.groups_of(self.weights()))

        self.use(work)


async def _turns_of_the_loop() -> None:
    """Time for what has ended to be seen, and for nothing else."""
    for _ in range(10):
        await asyncio.sleep(0)


def _check(result: GenerateResult, last: bool = True) -> None:
    """Columns as long as the tokens, log-probs that can be."""
    assert len(result.tokens) == len(result.log_probs) == len(result.weight_versions)
    assert all(log_prob <= 1e-6 for log_prob in result.log_probs)
    assert result.finish_reason in (("stop", "length", "abort") if last else ("",))
    assert all(isinstance(token, int) for token in result.tokens)
