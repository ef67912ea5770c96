"""In the style of slime's retool: a loop of requests, tool output between them, and columns kept by hand."""

import re

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample

MAX_TURNS = 3
TOOLS = {"add": lambda a, b: a + b}


def with_instructions(question: str) -> str:
    return f"Tools: {', '.join(TOOLS)}.\n{question}"


async def run_tools(said: str) -> tuple[str, bool]:
    call = re.search(r"add (\d+) (\d+)", said)
    if call is None:
        return "", True
    return f"\n<result>{TOOLS['add'](int(call[1]), int(call[2]))}</result>\n", False


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout, "this function begins again"
    sample.rollout_log_probs = None
    sample.rollout_top_p_token_ids = None
    sample.response, sample.response_length, sample.loss_mask = "", 0, []

    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt = with_instructions(sample.prompt)
    prompt_ids = state.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    sample.tokens = list(prompt_ids)
    response, response_ids, calls = "", [], 0
    loss_mask = sample.loss_mask  # the list that append_response_tokens lets grow
    if args.rollout_max_context_len is not None:
        longest = args.rollout_max_context_len
    else:
        longest = args.context_parallel_size * args.max_tokens_per_gpu

    for _turn in range(MAX_TURNS):
        total = len(prompt_ids) + len(response_ids)
        if total >= longest:
            sample.status = Sample.Status.TRUNCATED
            break
        params = dict(sampling_params)
        params["max_new_tokens"] = min(sampling_params.get("max_new_tokens", longest), longest - total)
        payload = {"input_ids": prompt_ids + response_ids, "sampling_params": params, "return_logprob": True}
        output = await post(url, payload)
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        said = output["text"]
        drawn = [item[1] for item in output["meta_info"]["output_token_logprobs"]]
        log_probs = [item[0] for item in output["meta_info"]["output_token_logprobs"]]
        response += said
        response_ids += drawn
        sample.append_response_tokens(
            args, tokens=drawn, log_probs=log_probs, trainable=True, meta_info=output["meta_info"]
        )
        if output["meta_info"]["finish_reason"]["type"] == "length":
            break
        observation, done = await run_tools(said)
        if done:
            break
        calls += 1
        observed = state.tokenizer(observation, add_special_tokens=False)["input_ids"]
        response += observation
        response_ids += observed
        sample.append_response_tokens(args, tokens=observed, trainable=False)

    sample.tokens = prompt_ids + response_ids
    sample.response_length = len(response_ids)
    sample.response = response
    sample.loss_mask = loss_mask
    sample.tool_call_count = calls
    return sample


async def reward_func(args, sample, **kwargs):
    if not isinstance(sample, Sample):
        raise TypeError("Sample must be an instance of Sample class.")
    text = sample.prompt + sample.response
    score = 1.0 if text.endswith(f"{sample.label}<|im_end|>") else -1.0
    if score < 0:
        score = min(-0.6, score + (getattr(sample, "tool_call_count", 0) - 2) / 2 * 0.1)
    return {"score": score, "acc": score > 0, "pred": sample.response[-8:]}
