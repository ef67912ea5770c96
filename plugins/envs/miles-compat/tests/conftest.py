"""A run's configuration on a tiny model, and functions as people write them for slime and Miles."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from miles_compat.current import current

from miles.config.load import resolve
from miles.contexts import GenerateContext
from miles.testing import tiny
from miles.testing.contract import installed
from miles.testing.generating import Script
from miles.types import Prompt, Sample, SamplingParams

FUNCTIONS = Path(__file__).parent / "functions"


@pytest.fixture(autouse=True)
def functions(monkeypatch: Any) -> None:
    """Their modules can be imported, as from the folder that one stands in."""
    monkeypatch.syspath_prepend(str(FUNCTIONS))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)


@pytest.fixture(autouse=True)
def configured(tmp_path: Any) -> Any:
    """`configured("--flag", ...)`: the hook was called with this configuration; without any when a test begins."""
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"input": "hello", "label": "hello"}\n')

    def configure(*flags: str, model: str = "llama") -> Any:
        words = ["--hf-checkpoint", str(tiny.saved(model)), "--prompt-data", str(data), "--num-rollout", "1", *flags]
        resolved = resolve((), words, purpose="show")
        current.begin(resolved.config)
        return resolved.config

    configure()
    yield configure
    current.end()


class Bench:
    """One sample through a component, with an engine that says what is written, or a real one."""

    def __init__(self) -> None:
        self.chat = tiny.chat_format(installed())

    def script(self, *answers: tuple[str, str]) -> Script:
        return Script(self.chat, answers or (("hello you", "stop"),))

    def sample(self, text: str | None = "hello", *, set: str = "default", **of_prompt: Any) -> Sample:
        tokens = self.chat.render_text(text or "")
        given = {"text": text, "label": "hello", "tokens": tokens, **of_prompt}
        return Sample.begin(Prompt("default:0", set, **given), id=5, group_id=1, seed=99)

    def context(self, generate: Any, **changes: Any) -> GenerateContext:
        stops = tuple(self.chat.stop_token_ids)
        sampling = SamplingParams(max_new_tokens=changes.pop("max_new_tokens", 64), stop_token_ids=stops)
        return GenerateContext(generate=generate, chat=self.chat, sampling=sampling, **changes)

    def build(self, kind: str, **options: Any) -> Any:
        from miles.config import Spec

        return installed().build(kind, Spec(name="slime_function", options=options))

    def generate(self, path: str, engine: Any, sample: Sample | None = None, **changes: Any) -> Any:
        options = changes.pop("options", {})
        function = self.build("generate_functions", path=path, **options)
        return asyncio.run(function(self.context(engine, **changes), sample or self.sample()))

    def on_torch(self, work: Any, model: str = "llama") -> Any:
        """`await work(engine)` with the torch engine on a tiny model."""
        from miles.config import Spec
        from miles.modeling import load_hf_config

        async def main() -> Any:
            folder = tiny.saved(model)
            context = tiny.engine_context(installed(), load_hf_config(folder), folder)
            engine = installed().build("rollout_engines", Spec(name="torch"), context=context)
            await engine.start()
            try:
                return await work(engine)
            finally:
                await engine.close()

        return asyncio.run(main())


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture
def lab() -> Any:
    return SimpleNamespace(tiny=tiny, installed=installed)
