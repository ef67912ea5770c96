"""`data`: task sets, their keys and sampling, and how prompts become tokens."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from miles.config.base import ComponentSpec, Flag, RewardSpecs, Section, Spec
from miles.types import SamplingParams


class Keys(Section):
    """Names of the columns in a prompt file."""

    input: Annotated[str, Flag("--input-key")] = "input"
    """Prompt: text, or a list of chat messages."""
    label: Annotated[str | None, Flag("--label-key")] = "label"
    """Ground truth; a file without this column is fine."""
    metadata: Annotated[str, Flag("--metadata-key")] = "metadata"
    """A mapping handed to rewards and environments."""
    tools: Annotated[str, Flag("--tool-key")] = "tools"
    """OpenAI tool schemas, as a list or as a JSON string."""
    images: Annotated[str | None, Flag("--image-key")] = None
    """Images of the prompt; a row that has any is an error: no chat format of this version takes them."""


class Sampling(Section):
    """How responses are drawn. Flags: `--rollout-*`."""

    temperature: Annotated[float, Flag("--rollout-temperature"), Field(ge=0)] = 1.0
    """0 is greedy (evaluation only)."""
    top_p: Annotated[float, Flag("--rollout-top-p"), Field(gt=0, le=1)] = 1.0
    """Keep the most likely tokens up to this mass."""
    top_k: Annotated[int, Flag("--rollout-top-k")] = -1
    """Keep this many of the most likely tokens; -1 keeps all."""
    min_p: Annotated[float, Flag("--rollout-min-p"), Field(ge=0, lt=1)] = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    max_new_tokens: Annotated[int, Flag("--rollout-max-response-len"), Field(gt=0)] = 256
    """Longest response, in tokens; longest turn, where there are several."""
    min_new_tokens: Annotated[int, Flag("--rollout-min-response-len"), Field(ge=0)] = 0
    """Stop tokens are impossible before this many."""
    stop: Annotated[tuple[str, ...], Flag("--rollout-stop")] = ()
    """Strings that end a response."""
    stop_token_ids: Annotated[tuple[int, ...], Flag("--rollout-stop-token-ids")] = ()
    """Token ids that end a response, besides those of the chat format."""

    def params(self) -> SamplingParams:
        return SamplingParams(**self.model_dump())


class EnvironmentLimitsSection(Section):
    """Over all environments of the task set. What is not given is for the environment to say."""

    calls: Annotated[int | None, Flag("--environment-calls"), Field(gt=0)] = None
    """Most of their resets and steps at once; the others wait, and ask no engine for anything meanwhile."""
    episodes: Annotated[int | None, Flag("--environment-episodes"), Field(gt=0)] = None
    """Most of them open at once, each from its reset until it is closed."""
    reset_timeout: Annotated[float | None, Flag("--environment-reset-timeout"), Field(gt=0)] = None
    """Seconds of a reset (600 if the environment says nothing either); then the sample is FAILED."""
    step_timeout: Annotated[float | None, Flag("--environment-step-timeout"), Field(gt=0)] = None
    """Seconds of a step (600), the same."""
    close_timeout: Annotated[float | None, Flag("--environment-close-timeout"), Field(gt=0)] = None
    """Seconds for closing (30); then it is left to itself, and counted."""


class TaskSet(Section):
    """One source of prompts with its own environment, generate function, reward and sampling."""

    name: Annotated[str, Flag()] = "default"
    """Appears in metrics and sample ids."""
    path: Annotated[str | None, Flag("--prompt-data")] = None
    """A .jsonl or .parquet file, or a hub data set as `hub:owner/name[:split]`; a suffix `@[a:b]` takes those rows."""
    weight: Annotated[float, Flag("--prompt-data-weight"), Field(gt=0)] = 1.0
    """Share of this set among the prompts of a training batch; evaluation takes every prompt of every set."""
    keys: Keys = Keys()
    sampling: Sampling = Sampling()
    n_samples_per_prompt: Annotated[int | None, Flag()] = None
    """Samples for each prompt; `rollout.n_samples_per_prompt` (or 1 in evaluation) when not given."""
    apply_chat_template: Annotated[bool, Flag("--apply-chat-template")] = False
    """Take a text prompt as one user message."""
    environment: Annotated[ComponentSpec | None, Flag("--environment")] = None
    """World that answers the model; None for single-turn tasks."""
    environment_limits: EnvironmentLimitsSection = EnvironmentLimitsSection()
    generate: Annotated[ComponentSpec, Flag("--generate")] = Spec(name="auto")
    """single_turn, multi_turn, dataset (SFT), or yours; `auto`: turns when there is an environment, else one turn."""
    reward: Annotated[RewardSpecs, Flag("--rm-type", "--reward")] = ()
    """Reward by name, or a mapping from names to weights."""
    max_turns: Annotated[int, Flag("--generate-max-turns"), Field(gt=0)] = 16
    """Most model turns in one trajectory. Each may have `sampling.max_new_tokens`; all of them, the prompt and what the
    environment says together may have `rollout.max_context_len`."""


class DataSection(Section):
    sets: tuple[TaskSet, ...] = ()
    """Task sets that are trained on; flat flags fill the one called `default`."""
    reward_terms: Annotated[RewardSpecs, Flag("--reward-terms")] = ()
    """Rewards that are added to those of every training set, and to none of evaluation."""
    source: Annotated[ComponentSpec, Flag("--data-source")] = Spec(name="files")
    """Where prompts come from."""
    chat_format: Annotated[ComponentSpec, Flag("--chat-format")] = Spec(name="auto")
    """The family's conversation as tokens; `auto` goes by model type, then by the tokenizer's template."""
    chat_template_kwargs: Annotated[dict[str, Any], Flag("--apply-chat-template-kwargs")] = {}
    """Passed to the chat template, such as {"enable_thinking": false}."""
    shuffle: Annotated[bool, Flag("--rollout-shuffle")] = False
    """Another order every epoch, instead of that of the files."""
    seed: Annotated[int, Flag("--rollout-seed")] = 42
    """Seed of the data order and of the samples' random draws."""
    max_prompt_len: Annotated[int | None, Flag("--rollout-max-prompt-len")] = None
    """Longer prompts are dropped and counted."""
    bad_lines: Annotated[Literal["error", "skip"], Flag("--bad-lines")] = "error"
    """What to do with a malformed row: stop with file and line, or skip and count it."""
