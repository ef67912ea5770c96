"""The receiving half of a weight sync: whole, at once, or not at all."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from safetensors.torch import save_file

from miles.errors import EngineError, WeightSyncError

PROBE = [3, 9, 27, 14]


def spoiled(lab, model, spoil):
    """The model's tensors after `spoil(dict)`, one group each."""
    tensors = dict(model.state_dict())
    spoil(tensors)
    return ({name: tensor} for name, tensor in tensors.items())


def drop(name):
    return lambda tensors: tensors.pop(name)


def test_no_service_before_the_first_weights(lab):
    async def main():
        engine = lab.make_engine(lab.model("qwen3"))
        await engine.start()
        assert (await engine.health()).weight_version == -1
        with pytest.raises(EngineError, match="no weights have arrived"):
            await engine.generate(lab.request(PROBE))
        with pytest.raises(EngineError, match="no weights have arrived"):
            await engine.score(PROBE)
        await engine.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("model.layers.1.mlp.down_proj.weight"), r"1 of \d+ tensors did not arrive: layers.1.down.weight"),
        (drop("model.layers.2.self_attn.k_proj.weight"), r"1 of \d+ tensors did not arrive: layers.2.qkv.weight"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(5)}),
            r"'norm.weight' has shape \[5\], expected \[32\]",
        ),
    ],
)
def test_an_incomplete_sync_is_refused_until_a_complete_one(lab, spoil, message):
    model = lab.model("qwen3")

    async def main():
        engine = await lab.started(model)
        with pytest.raises(WeightSyncError, match=message):
            await engine.receive("inprocess", 2, spoiled(lab, model, spoil))
        with pytest.raises(EngineError, match="version 2 did not complete"):
            await engine.generate(lab.request(PROBE))
        await engine.receive("inprocess", 3, lab.weights_of(model))
        assert (await engine.health()).weight_version == 3
        result = await engine.generate(lab.request(PROBE, max_new_tokens=2))
        await engine.close()
        return result

    assert asyncio.run(main()).weight_versions == [3, 3]


class TwiceBridge:
    """Yields one tensor a second time, and then one that nobody knows."""

    def __init__(self, bridge, extra):
        self.bridge, self.extra = bridge, extra
        self.config_for = bridge.config_for

    def to_world(self, world, hf_config, groups):
        yield from self.bridge.to_world(world, hf_config, groups)
        yield {self.extra: torch.zeros(32)}


@pytest.mark.parametrize(
    ("extra", "message"), [("norm.weight", "came twice"), ("norm.bias", "is not one of this model")]
)
def test_tensors_too_many_are_refused(lab, extra, message):
    async def main():
        engine = await lab.started(lab.model("qwen3"))
        engine.loader.bridge = TwiceBridge(engine.loader.bridge, extra)
        with pytest.raises(WeightSyncError, match=f"'{extra}' {message}"):
            await engine.receive("inprocess", 2, lab.weights_of(lab.model("qwen3")))
        await engine.close()

    asyncio.run(main())


def test_another_transport_is_refused(lab):
    async def main():
        engine = await lab.started(lab.model("qwen3"))
        with pytest.raises(WeightSyncError, match="transport 'nccl'"):
            await engine.receive("nccl", 2, [])
        assert (await engine.health()).weight_version == 1
        await engine.sleep(frozenset({"weights"}))
        with pytest.raises(WeightSyncError, match="asleep"):
            await engine.receive("inprocess", 2, lab.weights_of(lab.model("qwen3")))
        await engine.close()

    asyncio.run(main())


def test_an_idle_engine_copies_into_place_and_forgets_prefixes(lab):
    old, new = lab.make_model("qwen3", seed=1), lab.make_model("qwen3", seed=2)

    async def main():
        engine = await lab.started(old)
        request = lab.request(PROBE, seed=5, max_new_tokens=3)
        await engine.generate(request)
        places = {name: tensor.data_ptr() for name, tensor in engine.scheduler.decoder.weights.items()}
        await engine.receive("inprocess", 2, lab.weights_of(new))
        assert places == {name: tensor.data_ptr() for name, tensor in engine.scheduler.decoder.weights.items()}
        result = await engine.generate(request)
        await engine.close()
        return result

    result = asyncio.run(main())
    (fresh,) = lab.run(new, [lab.request(PROBE, seed=5, max_new_tokens=3)])
    assert (result.tokens, result.log_probs) == (fresh.tokens, fresh.log_probs)
    assert result.cached_tokens == 0
    assert result.weight_versions == [2, 2, 2]


def test_a_busy_engine_changes_weights_between_two_tokens(lab):
    """While it stages the new weights it goes on with the old; then every later token is of the new ones."""
    old, new = lab.make_model("qwen3", seed=1), lab.make_model("qwen3", seed=2)
    gate = threading.Event()

    def slowly():
        for group in lab.weights_of(new):
            gate.wait()
            yield group

    async def main():
        engine = await lab.started(old)
        running = asyncio.ensure_future(engine.generate(lab.request(PROBE, max_new_tokens=400, temperature=1.0)))
        while not engine.scheduler.slots.count:
            await asyncio.sleep(0.001)
        receiving = asyncio.ensure_future(engine.receive("inprocess", 2, slowly()))
        before = engine.scheduler.slots.lengths_S[0]
        while engine.scheduler.slots.lengths_S[0] < before + 20:
            await asyncio.sleep(0.001)
        gate.set()
        await receiving
        result = await running
        other = await engine.generate(lab.request([*PROBE, *result.tokens[:5]], max_new_tokens=1))
        await engine.close()
        return result, other

    result, other = asyncio.run(main())
    switch = result.weight_versions.index(2)
    assert result.weight_versions == [1] * switch + [2] * (400 - switch)
    assert switch >= 20
    # The last token before the switch is the old model's.
    log_probs = lab.reference(old, PROBE + result.tokens[:switch])[-2]
    assert result.log_probs[switch - 1] == pytest.approx(log_probs[result.tokens[switch - 1]].item(), abs=2e-5)
    # Keys and values of two versions are no prefix for anybody.
    assert other.cached_tokens == 0


def test_a_failed_sync_of_a_busy_engine_changes_nothing(lab):
    old, new = lab.make_model("qwen3", seed=1), lab.make_model("qwen3", seed=2)

    async def main():
        engine = await lab.started(old)
        running = asyncio.ensure_future(engine.generate(lab.request(PROBE, max_new_tokens=300)))
        while not engine.scheduler.slots.count:
            await asyncio.sleep(0.001)
        with pytest.raises(WeightSyncError, match="did not arrive"):
            await engine.receive("inprocess", 2, spoiled(lab, new, drop("model.norm.weight")))
        result = await running
        assert (await engine.health()).weight_version == 1
        await engine.close()
        return result

    (whole,) = lab.run(old, [lab.request(PROBE, max_new_tokens=300)])
    result = asyncio.run(main())
    assert (result.tokens, result.weight_versions) == (whole.tokens, [1] * 300)


def test_retracted_requests_compute_again_with_new_weights(lab):
    old, new = lab.make_model("qwen3", seed=1), lab.make_model("qwen3", seed=2)

    async def main():
        engine = await lab.started(old)
        running = asyncio.ensure_future(engine.generate(lab.request(PROBE, seed=4, max_new_tokens=200)))
        while not engine.scheduler.slots.count:
            await asyncio.sleep(0.001)
        await engine.pause("retract")
        await engine.receive("inprocess", 2, lab.weights_of(new))
        await engine.resume()
        result = await running
        await engine.close()
        return result

    result = asyncio.run(main())
    switch = result.weight_versions.index(2)
    log_probs = lab.reference(new, PROBE + result.tokens)[len(PROBE) - 1 : -1]
    for step in range(switch, 200):
        assert result.log_probs[step] == pytest.approx(log_probs[step, result.tokens[step]].item(), abs=2e-5)


def test_weights_come_from_a_checkpoint_when_asked(lab, tmp_path):
    model = lab.make_model("llama", seed=3)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")

    async def main(folder):
        engine = lab.make_engine(model, checkpoint=folder)
        await engine.start()
        try:
            return await engine.generate(lab.request(PROBE, max_new_tokens=4))
        finally:
            await engine.close()

    result = asyncio.run(main(tmp_path))
    (expected,) = lab.run(model, [lab.request(PROBE, max_new_tokens=4)])
    assert result.tokens == expected.tokens
    assert result.weight_versions == [0] * 4
    with pytest.raises(EngineError, match="no \\*.safetensors file"):
        asyncio.run(main(tmp_path / "empty"))
