"""Bridges that are wrong in one way each: that of llama with a mistake."""

import pytest
import torch

from miles.api import Sharding
from miles.testing import BridgeContract, installed

LLAMA = {"says": {"provides": ("llama",)}}


def llama():
    pytest.importorskip("miles_llama")
    from miles.config import Spec

    return installed().build("bridges", Spec(name="llama"))


def but(**methods):
    """`llama` with methods replaced; each gets the right bridge first."""

    def build():
        right = llama()

        class Wrong:
            def __getattr__(self, name):
                if name in methods:
                    return lambda *arguments: methods[name](right, *arguments)
                return getattr(right, name)

        return Wrong()

    return build


def changed(change, worlds=("decoder",)):
    """Tensors of a world, each through `change(name, tensor)`."""

    def to_world(right, world, config, groups, *part):
        for group in right.to_world(world, config, groups, *part):
            yield {n: change(n, t) if world in worlds else t for n, t in group.items()}

    return to_world


def swapped_norms(right, world, config, groups, *part):
    names = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "input_layernorm"}
    for group in right.to_world(world, config, groups, *part):
        yield {n.replace(k, names[k]) if (k := n.split(".")[-2]) in names else n: t for n, t in group.items()}


def collecting(right, world, config, groups, *part):
    yield from list(right.to_world(world, config, groups, *part))


def forgiving(right, world, config, groups, *part):
    try:
        yield from right.to_world(world, config, groups, *part)
    except Exception:
        return


def reversed_rows(name, tensor):
    return tensor.flip(0) if "qkv" in name else tensor


def believing(right, world, config, groups, *part):
    """Takes whatever a tied head says."""
    without = ({n: t for n, t in group.items() if n != "lm_head.weight"} for group in groups)
    yield from right.to_world(world, config, without, *part)


def test_the_right_one_passes(passes):
    passes(BridgeContract, llama, **LLAMA)


def test_wrong_ones_are_caught(catches):
    rounded = changed(lambda name, tensor: tensor.bfloat16().float())
    catches(
        BridgeContract,
        {
            "test_it_says_what_it_provides": [(llama, {"says": {}})],
            "test_the_torch_world_is_the_modules_state_dict": [
                but(to_world=swapped_norms),
                but(to_world=changed(lambda name, tensor: tensor.t() if tensor.ndim == 2 else tensor, ("torch",))),
            ],
            "test_there_and_back_bit_for_bit": [but(to_world=rounded), but(to_world=changed(reversed_rows))],
            "test_no_number_is_lost_or_made_up": [
                but(to_world=changed(lambda name, tensor: torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])]))),
                but(to_world=changed(lambda name, tensor: tensor * 2)),
            ],
            "test_it_streams": [but(to_world=collecting)],
            "test_a_missing_and_a_foreign_tensor_are_errors": [but(to_world=forgiving)],
            "test_a_tied_head_is_one_tensor": [but(to_world=believing)],
            "test_shards_together_are_the_whole": [
                but(sharding=lambda right, config, name: Sharding(0)),
                but(to_world=lambda right, world, config, groups, *part: right.to_world(world, config, groups)),
            ],
            "test_every_tensor_has_a_sharding": [
                but(sharding=lambda right, config, name: None),
                but(sharding=lambda right, config, name: Sharding()),
            ],
            "test_dimensions_of_each_world": [
                but(config_for=lambda right, world, config: {}),
                but(config_for=lambda right, world, config: None),
            ],
            "test_the_built_in_engine_computes_what_transformers_does": [
                but(to_world=changed(reversed_rows)),
                but(config_for=lambda r, w, c: {**r.config_for(w, c), "rope_parameters": {"rope_theta": 5.0}}),
                but(config_for=lambda r, w, c: {**r.config_for(w, c), "rms_norm_eps": 0.5}),
            ],
        },
        **LLAMA,
    )
