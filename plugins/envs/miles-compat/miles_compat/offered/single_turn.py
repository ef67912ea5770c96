"""`rollout.sglang_rollout`: what functions look up of the run, and upstream's own single turn."""

from __future__ import annotations

import asyncio
from typing import Any

from miles_compat.model import tokenizer
from miles_compat.offered.http import post
from miles_compat.offered.inputs import GenerateFnInput, GenerateFnOutput
from miles_compat.upstream import Sample, Status

__all__ = ["GenerateState", "generate", "get_model_url"]


class GenerateState:
    """What is known of the run besides `args`. One for one `args`."""

    _known: Any = (None, None)

    def __new__(cls, args: Any) -> GenerateState:
        if cls._known[0] is not args:
            cls._known = (args, super().__new__(cls)._read(args))
        return cls._known[1]

    def _read(self, args: Any) -> GenerateState:
        self.args = args
        self.tokenizer = tokenizer()
        self.processor = None
        self.semaphore = self.generate_fn_semaphore = asyncio.Semaphore(args.sglang_server_concurrency)
        self.sampling_params = {
            "temperature": args.rollout_temperature,
            "top_p": args.rollout_top_p,
            "top_k": args.rollout_top_k,
            "max_new_tokens": args.rollout_max_response_len,
            "stop": args.rollout_stop,
            "stop_token_ids": args.rollout_stop_token_ids,
            "skip_special_tokens": args.rollout_skip_special_tokens,
            "no_stop_trim": True,
            "spaces_between_special_tokens": False,
        }
        self.reset()
        return self

    def reset(self) -> None:
        self.aborted = False
        """Always so: an answer says by its finish reason that it was aborted."""


def get_model_url(args: Any, model_name: str, endpoint: str = "/generate") -> str:
    """Where the policy answers: there is one model."""
    return f"http://{args.sglang_router_ip}:{args.sglang_router_port}{endpoint}"


async def generate(args: Any, sample: Any = None, sampling_params: Any = None) -> Any:
    """One answer to the prompt, or the rest of one that was aborted: with `(args, sample, sampling_params)` as in
    slime, or with a `GenerateFnInput` as in Miles."""
    if isinstance(args, GenerateFnInput):
        return GenerateFnOutput(await _single_turn(args.args, args.sample, args.sampling_params))
    return await _single_turn(args, sample, sampling_params)


async def _single_turn(args: Any, sample: Sample, sampling_params: dict[str, Any]) -> Sample:
    if not sample.tokens:
        prompt = sample.prompt
        if not isinstance(prompt, str):
            tools = sample.metadata.get("tools")
            prompt = tokenizer().apply_chat_template(prompt, tools=tools, tokenize=False, add_generation_prompt=True)
        sample.tokens = tokenizer().encode(prompt, add_special_tokens=False)
    room = sampling_params["max_new_tokens"] - sample.response_length
    if args.rollout_max_context_len is not None:
        room = min(room, args.rollout_max_context_len - len(sample.tokens))
    if room <= 0:
        sample.status = Status.TRUNCATED
        return sample
    payload = {
        "input_ids": list(sample.tokens),
        "sampling_params": {**sampling_params, "max_new_tokens": room},
        "return_logprob": True,
        "return_routed_experts": args.use_rollout_routing_replay,
    }
    output = await post(get_model_url(args, "policy"), payload)
    meta_info = output["meta_info"]
    drawn = meta_info["output_token_logprobs"]
    sample.append_response_tokens(
        args,
        tokens=[entry[1] for entry in drawn],
        log_probs=[entry[0] for entry in drawn],
        meta_info=meta_info,
        text=output["text"],
    )
    return sample
