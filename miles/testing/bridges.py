"""The contract of bridges: one model family's names in each world."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from miles.config import Spec
from miles.errors import MilesError
from miles.parts import Part, Sharding, Share
from miles.protocols import EngineContext
from miles.testing import tiny
from miles.testing.contract import ComponentContract, installed
from miles.weights import join_shards

WORDS = [5, 17, 3, 3, 200, 41, 8]


class BridgeContract(ComponentContract):
    """Conversions between worlds, bit for bit, on tiny random models of every family that it `provides`.

    Example:
        class TestLlama(BridgeContract):
            name = "llama"
    """

    kind = "bridges"
    worlds: ClassVar[Sequence[str]] = ("hf", "torch", "decoder")
    """The worlds that it converts to and from; without `decoder` the built-in engine cannot serve the family."""
    changes: ClassVar[Mapping[str, Any]] = {}
    """Fields of every config of these tests, over those of `tiny.DIMENSIONS`."""
    splits: ClassVar[bool] = True
    """It says how tensor parallelism divides the weights."""

    def configs(self) -> dict[str, Any]:
        """What it is tried on: each family it provides, with a head of its own and with a tied one."""
        return {
            f"{family}{', tied' if tied else ''}": tiny.hf_config(family, tie_word_embeddings=tied, **self.changes)
            for family in self.component.provides
            for tied in (False, True)
        }

    def models(self) -> list[tuple[str, Any, Any, dict[str, Tensor]]]:
        """Name, config, transformers module, and the tensors of its checkpoint as transformers writes them."""
        from safetensors.torch import load_file

        found = []
        for name, config in self.configs().items():
            model = tiny.model(config)
            with TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                found.append((name, model.config, model, load_file(Path(folder) / "model.safetensors")))
        return found

    def test_it_says_what_it_provides(self) -> None:
        """`model.bridge: auto` goes by the Hugging Face model type; a bridge without any is never chosen."""
        assert self.component.provides, "Component(provides=...) names no model type"

    def test_the_torch_world_is_the_modules_state_dict(self) -> None:
        """Every name of the transformers module and no other, tied and fused tensors included: what is missing stays
        random."""
        for name, config, model, checkpoint in self.models():
            there = tiny.merged(self.build().to_world("torch", config, tiny.groups_of(checkpoint)))
            _same(there, model.state_dict(), f"{name}: torch")

    def test_there_and_back_bit_for_bit(self) -> None:
        """Loading and exporting are inverses in every world, in whatever order tensors come."""
        for name, config, _, checkpoint in self.models():
            for world in self.worlds:
                bridge = self.build()
                there = tiny.merged(bridge.to_world(world, config, tiny.groups_of(checkpoint)))
                backwards = ({key: there[key]} for key in reversed(there))
                _same(tiny.merged(bridge.from_world(world, config, backwards)), checkpoint, f"{name}: {world}")

    def test_no_number_is_lost_or_made_up(self) -> None:
        """A world holds the checkpoint's numbers, rearranged: no padding, no scaling, no second copy but of what is
        tied."""
        for name, config, _, checkpoint in self.models():
            for world in self.worlds:
                there = tiny.merged(self.build().to_world(world, config, tiny.groups_of(checkpoint)))
                ours, theirs = (torch.cat([t.flatten().double() for t in s.values()]) for s in (there, checkpoint))
                assert torch.equal(ours.unique(), theirs.unique()), f"{name}: {world}"

    def test_it_streams(self) -> None:
        """A group leaves as soon as its parts have come: a model of 200 GB is never held twice."""
        for name, config, _, checkpoint in self.models():
            drawn = [0]

            def counted(source: Mapping[str, Tensor] = checkpoint, drawn: list[int] = drawn) -> Any:
                for group in tiny.groups_of(source):
                    drawn[0] += 1
                    yield group

            for world in self.worlds:
                drawn[0] = 0
                next(iter(self.build().to_world(world, config, counted())))
                assert drawn[0] < len(checkpoint), f"{name}: {world} waits for the whole checkpoint"

    def test_a_missing_and_a_foreign_tensor_are_errors(self) -> None:
        """A file that was not downloaded, or a checkpoint of another format, must not become a random layer."""
        for _, config, _, checkpoint in self.models():
            lost = sorted(checkpoint)[len(checkpoint) // 2]
            for world in self.worlds:
                less = {key: tensor for key, tensor in checkpoint.items() if key != lost}
                more = {**checkpoint, "model.layers.0.no_such_part.weight": torch.zeros(2)}
                for tensors in (less, more):
                    with pytest.raises(MilesError):
                        list(self.build().to_world(world, config, tiny.groups_of(tensors)))

    def test_a_tied_head_is_one_tensor(self) -> None:
        """A module has it under two names, a checkpoint under one; a repeated one is fine, a different one is not."""
        tied = [model for model in self.models() if model[1].tie_word_embeddings]
        for name, config, model, checkpoint in tied:
            bridge, state = self.build(), model.state_dict()
            _same(tiny.merged(bridge.from_world("torch", config, tiny.groups_of(state))), checkpoint, name)
            once = dict(model.named_parameters())
            for tied_name in state.keys() - once.keys() - dict(model.named_buffers()).keys():
                repeated = {**checkpoint, tied_name: state[tied_name]}
                _same(tiny.merged(bridge.to_world("torch", config, tiny.groups_of(repeated))), state, f"{name}, twice")
                other = {**repeated, tied_name: state[tied_name] + 1}
                with pytest.raises(MilesError):
                    list(bridge.to_world("torch", config, tiny.groups_of(other)))

    def test_shards_together_are_the_whole(self) -> None:
        """What two tensor-parallel ranks hold, put together as `sharding` says, is the checkpoint."""
        if not self.splits:
            pytest.skip("does not divide the weights")
        for name, config, _, checkpoint in self.models():
            for world in self.worlds:
                bridge = self.build()
                shards: dict[str, list[Tensor]] = {key: [] for key in checkpoint}
                for rank in range(2):
                    part = Part(tensor=Share(rank, 2), expert_tensor=Share(rank, 2))
                    held = tiny.merged(bridge.to_world(world, config, tiny.groups_of(checkpoint), part))
                    for key, piece in tiny.merged(bridge.from_world(world, config, tiny.groups_of(held), part)).items():
                        shards[key].append(piece)
                whole = {key: join_shards(pieces, bridge.sharding(config, key)) for key, pieces in shards.items()}
                _same(whole, checkpoint, f"{name}: {world} in two")

    def test_every_tensor_has_a_sharding(self) -> None:
        """An exporter asks for each; the big matrices are divided, or tensor parallelism saves no memory."""
        for name, config, _, checkpoint in self.models():
            found = {key: self.build().sharding(config, key) for key in checkpoint}
            assert all(isinstance(sharding, Sharding) for sharding in found.values()), name
            divided = [key for key, sharding in found.items() if sharding.dim is not None]
            assert not self.splits or len(divided) > len(found) // 3, f"{name}: nearly nothing is divided"

    def test_dimensions_of_each_world(self) -> None:
        """`config_for` is a mapping for the worlds that need one, and an error for a world nobody has heard of."""
        for config in self.configs().values():
            for world in self.worlds:
                assert isinstance(self.build().config_for(world, config), Mapping), world
            with pytest.raises(MilesError):
                self.build().config_for("no such world", config)

    def test_the_built_in_engine_computes_what_transformers_does(self) -> None:
        """Names may be right and rows exchanged, or a dimension misread: only the log-probabilities tell."""
        if "decoder" not in self.worlds:
            pytest.skip("the built-in engine does not serve this family")
        for name, config, model, checkpoint in self.models():
            found = torch.tensor(asyncio.run(self._scores(config, checkpoint)))
            torch.testing.assert_close(found, tiny.log_probs_of(model, WORDS), atol=2e-4, rtol=1e-3, msg=name)

    async def _scores(self, config: Any, checkpoint: Mapping[str, Tensor]) -> Any:
        context = EngineContext(
            checkpoint=Path("."),
            hf_config=config,
            tokenizer=tiny.tokenizer(),
            bridge=self.build(),
            device="cpu",
            dtype="fp32",
            load_weights=False,
            run_dir=Path("."),
        )
        engine = installed().build("rollout_engines", Spec(name="torch"), context=context)
        await engine.start()
        try:
            await engine.receive("inprocess", 1, tiny.groups_of(checkpoint))
            return await engine.score(WORDS)
        finally:
            await engine.close()


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    assert not missing, f"{where}: missing {missing[:5]}"
    assert not extra, f"{where}: unexpected {extra[:5]}"
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different, f"{where}: other numbers in {different[:5]}"
