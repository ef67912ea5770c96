"""Models that SGLang would serve as other ones are refused, before anything is built and when the engine starts."""

import asyncio
from dataclasses import replace

import pytest
from fake_server import FakeSGLang, context, listening
from miles_sglang.engine import SGLangEngine
from miles_sglang.models import FAMILIES, misread, misread_checkpoint
from miles_sglang.options import ExternalOptions

from miles.api import EngineError
from miles.cli import main
from miles.testing import tiny
from miles.testing.contract import installed


def start(family, server=None, **changes):
    """An engine for a model of this family, before a server that takes 4,096 tokens."""
    config = tiny.hf_config(family, **changes)

    async def story():
        fake = server or FakeSGLang()
        async with listening(fake):
            given = ExternalOptions(urls=[fake.url], start_timeout=5)
            engine = SGLangEngine(given, context=replace(context(), hf_config=config))
            try:
                await engine.start()
            finally:
                await engine.close()

    asyncio.run(story())


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tie_word_embeddings": True}, "ignores tie_word_embeddings.*tie_word_embeddings false and a lm_head.weight"),
        ({"mlp_only_layers": [0]}, "ignores mlp_only_layers and decoder_sparse_step.*--rollout-engine torch"),
        ({"decoder_sparse_step": 2}, "ignores mlp_only_layers and decoder_sparse_step.*--rollout-engine torch"),
    ],
)
def test_a_mixture_that_sglang_misreads_is_refused(family, changes, said):
    with pytest.raises(EngineError, match=f"for {family} models, SGLang .*{said}"):
        start(family, **changes)
    start(family)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_dense_models_may_be_tied(family):
    start(family, tie_word_embeddings=True)


def test_a_window_that_is_shorter_than_what_servers_take_is_refused():
    with pytest.raises(EngineError, match=r"sliding window of 4095 tokens, .*of 4096\. .*--context-length 4095"):
        start("mistral", sliding_window=4095)
    start("mistral", sliding_window=4096)
    start("mistral", sliding_window=None)
    start("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=99)  # more layers than there are
    start("llama", sliding_window=8)  # left over: transformers has no window for Llama either


def test_miles_serve_reads_everything():
    start("qwen3_moe", FakeSGLang(server="miles serve"), tie_word_embeddings=True, mlp_only_layers=[0])


def test_families_of_others_are_not_judged():
    config = tiny.hf_config("mistral", sliding_window=8)
    config.model_type = "gemma9"
    assert misread(config, 4096) == ""


@pytest.fixture
def dry_run(tmp_path, capsys):
    """`dry_run(config, *flags)`: what `--dry-run` complains of, for a checkpoint of this config."""
    folder, prompts = tmp_path / "model", tmp_path / "prompts.jsonl"
    prompts.write_text('{"input": "1 + 1", "label": "2"}\n')

    def complaint(config, *flags):
        config.save_pretrained(folder)
        words = ["--dry-run", "--hf-checkpoint", str(folder), "--prompt-data", str(prompts), "--rm-type", "math"]
        status = main(["train", *words, "--num-rollout", "1", *(flags or ("--rollout-engine", "sglang"))])
        said = capsys.readouterr().err
        assert status == (2 if said else 0)
        return said

    return complaint


def test_a_dry_run_finds_them(dry_run):
    said = dry_run(tiny.hf_config("qwen3_moe", tie_word_embeddings=True))
    assert "model: for qwen3_moe models, SGLang (0.5.17) ignores tie_word_embeddings" in said
    assert dry_run(tiny.hf_config("qwen3_moe")) == ""
    assert dry_run(tiny.hf_config("qwen3_moe", tie_word_embeddings=True), "--rollout-engine", "torch") == ""


def test_a_dry_run_knows_how_long_sequences_may_be(dry_run):
    config = tiny.hf_config("mistral", sliding_window=64, max_position_embeddings=128)
    assert "window of 64 tokens, and its servers take sequences of 128." in dry_run(config)
    assert dry_run(config, "--rollout-engine", "sglang", "--sglang-context-length", "64") == ""


def test_what_is_not_here_yet_is_found_when_servers_start(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert misread_checkpoint("nobody/has-this", None, None) == ""


def test_every_family_of_our_bridges_was_looked_up():
    """Whoever adds one looks at what its class in SGLang reads of the config, and how it loads weights."""
    ours = [installed().component("bridges", name) for name in ("llama", "qwen")]
    assert {family for bridge in ours for family in bridge.provides} == FAMILIES
