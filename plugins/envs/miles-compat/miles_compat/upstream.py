"""The `Sample` that functions of slime and Miles are given: their fields, their methods, as those projects have them.

Columns hold the response alone, `response_length` entries each; `None` stands for "all ones" in `loss_mask` and for
"not known" elsewhere. One class stands for `slime.utils.types.Sample` and `miles.utils.types.Sample`; a method that
only one of the two projects has is here for both. It may be given any further attribute, which is kept for the
reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np


@dataclass
class SpecInfo:
    """Speculative decoding. Engines of miles say nothing of it: all zeros, unless a function counts."""

    spec_accept_token_num: int = 0
    spec_draft_token_num: int = 0
    spec_verify_ct: int = 0
    completion_token_num: int = 0

    @property
    def spec_accept_rate(self) -> float:
        drafted = self.spec_draft_token_num
        return self.spec_accept_token_num / drafted if drafted > 0 else 0.0

    @property
    def spec_accept_length(self) -> float:
        verified = self.spec_verify_ct
        return self.completion_token_num / verified if verified > 0 else 0.0

    def add(self, meta_info: Mapping[str, Any]) -> None:
        for name in ("spec_accept_token_num", "spec_draft_token_num", "spec_verify_ct"):
            setattr(self, name, getattr(self, name) + meta_info.get(name, 0))
        self.completion_token_num += meta_info.get("completion_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, int]) -> SpecInfo:
        return cls(**{each.name: data.get(each.name, 0) for each in fields(cls)})


@dataclass
class PrefixCacheInfo:
    """Prompt tokens, and those of them that came from the cache."""

    cached_tokens: int = 0
    total_prompt_tokens: int = 0

    @property
    def prefix_cache_hit_rate(self) -> float:
        return self.cached_tokens / self.total_prompt_tokens if self.total_prompt_tokens > 0 else 0.0

    def add(self, meta_info: Mapping[str, Any]) -> None:
        self.cached_tokens += meta_info.get("cached_tokens", 0)
        self.total_prompt_tokens += meta_info.get("prompt_tokens", 0)

    def to_dict(self) -> dict[str, int]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, data: Mapping[str, int]) -> PrefixCacheInfo:
        return cls(**{each.name: data.get(each.name, 0) for each in fields(cls)})


class Status(Enum):
    PENDING = "pending"
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    FAILED = "failed"


ENDED = {"stop": Status.COMPLETED, "length": Status.TRUNCATED, "abort": Status.ABORTED}
"""SGLang's finish reason -> status."""
COLUMNS = ("loss_mask", "rollout_log_probs", "teacher_log_probs", "opd_reverse_kl")
"""Fields with an entry for each token of the response."""


@dataclass
class Sample:
    group_index: int | None = None
    index: int | None = None
    rollout_id: int | None = None
    """Siblings of one trajectory share it; None stands for `index`."""
    prompt: str | list[dict[str, Any]] = ""
    tokens: list[int] = field(default_factory=list)
    """Prompt and response; empty in a sample that nothing was generated for."""
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    multimodal_train_input_id: str | None = None
    apply_chat_template_kwargs: dict = field(default_factory=dict)
    response: str = ""
    response_length: int = 0
    label: Any = None
    reward: float | dict[str, Any] | None = None
    loss_mask: list[int] | None = None
    weight_versions: list[str] = field(default_factory=list)
    """One for each answer of the engine."""
    rollout_log_probs: list[float] | None = None
    rollout_top_p_token_ids: Any = None
    rollout_top_p_token_offsets: Any = None
    rollout_routed_experts: Any = None
    """int32 `[len(tokens) - 1, layers, top_k]`, -1 where nothing was recorded."""
    rollout_indexer_topk: Any = None
    remove_sample: bool = False
    """Nothing of it is trained on; it counts as a sample all the same."""
    teacher_log_probs: list[float] | None = None
    opd_reverse_kl: list[float] | None = None
    status: Status = Status.PENDING
    metadata: dict = field(default_factory=dict)
    generate_function_path: str | None = None
    custom_rm_path: str | None = None
    train_metadata: dict | None = None
    adapter: Any = None
    reward_spec: Any = None
    session_id: str | None = None
    routing_key: str | None = None
    non_generation_time: float = 0.0
    """Seconds of tools and environments."""
    spec_info: SpecInfo = field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = field(default_factory=PrefixCacheInfo)

    @property
    def further(self) -> dict[str, Any]:
        """Attributes that a function has set and no field is called."""
        return {name: value for name, value in vars(self).items() if name not in self.__dataclass_fields__}

    # ------------------------------------------------------------------------------------------ what both projects have

    def get_reward_value(self, args: Any) -> Any:
        return self.reward[args.reward_key] if args.reward_key else self.reward  # type: ignore[index]

    @property
    def effective_response_length(self) -> int:
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    def to_dict(self) -> dict[str, Any]:
        told = {"status": self.status.value, "spec_info": self.spec_info.to_dict()}
        return {**vars(self), **told, "prefix_cache_info": self.prefix_cache_info.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sample:
        read = {
            **data,
            "status": Status(data["status"]),
            "spec_info": SpecInfo.from_dict(data.get("spec_info", {})),
            "prefix_cache_info": PrefixCacheInfo.from_dict(data.get("prefix_cache_info", {})),
        }
        sample = cls(**{name: value for name, value in read.items() if name in cls.__dataclass_fields__})
        for name, value in read.items():
            setattr(sample, name, value)
        return sample

    # ------------------------------------------------------------------------------------------------- slime's methods

    def append_response_tokens(
        self,
        args: Any = None,
        *,
        tokens: Sequence[int] | None = None,
        log_probs: Sequence[float] | None = None,
        trainable: bool = True,
        meta_info: Mapping[str, Any] | None = None,
        text: str | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Add tokens of the model (`trainable`, with log-probs) or of the environment (without) to the response. The
        lists grow themselves: a function may have kept one of them.

        Raises:
            ValueError: log-probs are missing, too many, or given for the environment; a column does not fit.
        """
        new = [int(token) for token in (() if tokens is None else tokens)]
        told = None if log_probs is None else [float(value) for value in log_probs]
        if told is not None and len(told) != len(new):
            raise ValueError(f"{len(told)} log_probs for {len(new)} tokens")
        if new and trainable and told is None:
            raise ValueError("tokens that are trained on need the log-probs of their rollout")
        if new and not trainable:
            if told is not None:
                raise ValueError("tokens that are not trained on have no log-probs of a rollout")
            told = [0.0] * len(new)
        before = self.response_length
        if new:
            if self.loss_mask is None:
                self.loss_mask = [1] * before
            self.loss_mask += [int(trainable)] * len(new)
            self.tokens += new
            self.response_length = before + len(new)
        if told is not None:
            if self.rollout_log_probs is None and trainable and before:
                raise ValueError(f"the {before} tokens before these have no log-probs: give them too, or none at all")
            if self.rollout_log_probs is None:
                self.rollout_log_probs = [0.0] * before
            self.rollout_log_probs += told
        self.response += text or ""
        if meta_info is not None:
            self._take_experts(args, meta_info)
            if update_terminal_info and "finish_reason" in meta_info:
                self.update_from_meta_info(args, meta_info)
        self.check_columns()

    def _take_experts(self, args: Any, meta_info: Mapping[str, Any]) -> None:
        if not isinstance(meta_info.get("routed_experts"), str):
            return
        from miles_compat.experts import decoded_experts

        start = int(meta_info.get("routed_experts_start_len") or 0)
        rows = decoded_experts(meta_info["routed_experts"], args, max(len(self.tokens) - 1 - start, 0))
        known = self.rollout_routed_experts
        self.rollout_routed_experts = rows if not start else np.concatenate([np.asarray(known)[:start], rows])

    def check_columns(self) -> None:
        """Raises ValueError for a column that has another length than the response."""
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None and len(column) != self.response_length:
                raise ValueError(f"{name} has {len(column)} entries, response_length is {self.response_length}")

    # ------------------------------------------------------------------------------------------------- Miles' methods

    def update_from_meta_info(self, args: Any, meta_info: Mapping[str, Any]) -> None:
        """Status, weight version and counts of one answer of the engine."""
        if getattr(args, "sglang_speculative_algorithm", None):
            self.spec_info.add(meta_info)
        self.prefix_cache_info.add(meta_info)
        if "weight_version" in meta_info:
            self.weight_versions.append(meta_info["weight_version"])
        self.status = ENDED.get(meta_info["finish_reason"]["type"], self.status)

    def validate(self) -> None:
        """Raises AssertionError, as in Miles."""
        if not 0 <= self.response_length <= len(self.tokens):
            raise AssertionError(f"response_length is {self.response_length} of {len(self.tokens)} tokens")
        try:
            self.check_columns()
        except ValueError as error:
            raise AssertionError(str(error)) from error
        rows = self.rollout_routed_experts
        if rows is not None and len(rows) != len(self.tokens) - 1:
            raise AssertionError(f"rollout_routed_experts has {len(rows)} rows for {len(self.tokens)} tokens")

    def strip_last_output_tokens(self, n: int, tokenizer: Any) -> None:
        """Remove the last `n` tokens of the response from every column."""
        if n <= 0:
            return
        if n > self.response_length:
            raise AssertionError(f"cannot strip {n} tokens of a response of {self.response_length}")
        for name in ("tokens", *COLUMNS, "rollout_routed_experts", "rollout_indexer_topk"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[:-n])
        self.response_length -= n
        kept = self.tokens[len(self.tokens) - self.response_length :]
        self.response = tokenizer.decode(kept) if kept else ""

    def reset_for_retry(self) -> None:
        """Forget what was generated; the status is ABORTED then, as in Miles."""
        fresh = type(self)(status=Status.ABORTED)
        for name in (
            "tokens", "multimodal_train_inputs", "response", "response_length", "reward", "weight_versions",
            "rollout_routed_experts", "rollout_indexer_topk", "status", "non_generation_time", "spec_info",
            "prefix_cache_info", "remove_sample", "train_metadata", *COLUMNS,
        ):  # fmt: skip
            setattr(self, name, getattr(fresh, name))

    @property
    def oldest_weight_version(self) -> int | None:
        numbers = [int(version) for version in self.weight_versions if str(version).isdigit()]
        return min(numbers, default=None)


Sample.Status = Status  # type: ignore[attr-defined]
Sample.SpecInfo = SpecInfo  # type: ignore[attr-defined]
Sample.PrefixCacheInfo = PrefixCacheInfo  # type: ignore[attr-defined]
