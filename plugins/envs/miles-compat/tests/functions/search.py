"""In the style of search-r1: text in, stop strings at the tags, log-probs and masks as lists beside the sample."""

from slime.rollout.sglang_rollout import GenerateState
from slime.utils.http_utils import post
from slime.utils.types import Sample


async def search(query: str) -> str:
    return f"what is known of {query.strip()}"


async def generate(args, sample: Sample, sampling_params) -> Sample:
    assert not args.partial_rollout
    state = GenerateState(args)
    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    prompt_text = sample.prompt
    prompt_ids = state.tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    stops = sampling_params.get("stop") or []
    sampling_params = {**sampling_params, "stop": [*stops, "</search>", "</answer>"]}
    response, response_ids, loss_mask, log_probs = "", [], [], []
    for _turn in range(2):
        output = await post(
            url, {"text": prompt_text + response, "sampling_params": sampling_params, "return_logprob": True}
        )
        if output["meta_info"]["finish_reason"]["type"] == "abort":
            sample.status = Sample.Status.ABORTED
            return sample
        drawn = output["meta_info"]["output_token_logprobs"]
        response += output["text"]
        response_ids += [item[1] for item in drawn]
        log_probs += [item[0] for item in drawn]
        loss_mask += [1] * len(drawn)
        if output["meta_info"]["finish_reason"]["type"] == "length" or "</search>" not in output["text"]:
            break
        query = output["text"].split("<search>")[-1].split("</search>")[0]
        found = f"\n<information>{await search(query)}</information>\n"
        found_ids = state.tokenizer(found, add_special_tokens=False)["input_ids"]
        response += found
        response_ids += found_ids
        log_probs += [0.0] * len(found_ids)
        loss_mask += [0] * len(found_ids)
        assert len(response_ids) == len(log_probs)
    sample.tokens = prompt_ids + response_ids
    sample.response_length = len(response_ids)
    sample.response = response
    sample.loss_mask = loss_mask
    sample.prompt = prompt_text
    sample.rollout_log_probs = log_probs or None
    sample.update_from_meta_info(args, output["meta_info"])
    return sample
