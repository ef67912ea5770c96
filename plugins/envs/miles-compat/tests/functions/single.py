"""As one writes a generate function that changes nothing: ask once, keep what comes."""

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def generate(args, sample: Sample, sampling_params) -> Sample:
    state = GenerateState(args)
    if not sample.tokens:
        sample.tokens = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    budget = sampling_params["max_new_tokens"] - sample.response_length
    if args.rollout_max_context_len is not None:
        budget = min(budget, args.rollout_max_context_len - len(sample.tokens))
    if budget <= 0:
        sample.status = Sample.Status.TRUNCATED
        return sample
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    payload = {
        "input_ids": sample.tokens,
        "sampling_params": {**sampling_params, "max_new_tokens": budget},
        "return_logprob": True,
    }
    output = await post(url, payload)
    drawn = output["meta_info"]["output_token_logprobs"]
    sample.tokens = sample.tokens + [entry[1] for entry in drawn]
    sample.response += output["text"]
    sample.response_length += len(drawn)
    sample.rollout_log_probs = (sample.rollout_log_probs or []) + [entry[0] for entry in drawn]
    sample.loss_mask = (sample.loss_mask or []) + [1] * len(drawn)
    sample.weight_versions.append(output["meta_info"]["weight_version"])
    match output["meta_info"]["finish_reason"]["type"]:
        case "length":
            sample.status = Sample.Status.TRUNCATED
        case "abort":
            sample.status = Sample.Status.ABORTED
        case "stop":
            sample.status = Sample.Status.COMPLETED
    return sample
