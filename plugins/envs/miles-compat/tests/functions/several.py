"""Functions that make several samples of one, or break what is agreed on."""

import asyncio
import copy
import json
import urllib.request

from miles.rollout.base_types import GenerateFnInput, GenerateFnOutput
from miles.rollout.rm_hub import batched_async_rm
from miles.rollout.sglang_rollout import GenerateState, get_model_url
from miles.utils.http_utils import get, post
from miles.utils.types import Sample
from single import generate as single

LOCK = asyncio.Semaphore(2)
"""Made at import, as one does for tools that take few calls at once."""


async def solvers(args, sample: Sample, sampling_params, evaluation=False) -> list[Sample]:
    """Two attempts at one prompt, at the same time; the function rewards the first one itself."""
    attempts = [copy.deepcopy(sample) for _ in range(1 if evaluation else 2)]
    async with LOCK:
        attempts = await asyncio.gather(*(single(args, one, dict(sampling_params)) for one in attempts))
    attempts[0].reward = 0.25
    return list(attempts)


async def two_turns(args, sample, sampling_params):
    await single(args, sample, sampling_params)
    sample.append_response_tokens(args, tokens=[5, 6], trainable=False)
    return await single(args, sample, {**sampling_params, "max_new_tokens": 20})


async def notes_what_it_gets(args, sample, sampling_params):
    s = sample
    s.metadata["given"] = [
        s.prompt, s.label, s.tokens, s.response_length, s.group_index, s.index, s.loss_mask, s.status.value
    ]  # fmt: skip
    if not isinstance(s.prompt, str):
        template = GenerateState(args).tokenizer.apply_chat_template
        s.tokens = template(s.prompt, add_generation_prompt=True, return_dict=False)
    return await single(args, s, sampling_params)


async def judged(args, sample, sampling_params):
    """Asks for the run's own reward function."""
    made = [await single(args, sample, sampling_params)]
    rewards = await batched_async_rm(args, made)
    for one, reward in zip(made, rewards, strict=True):
        one.reward = reward
        one.metadata["judged"] = True
    return made


async def with_input(input: GenerateFnInput) -> GenerateFnOutput:
    sample = input.sample
    sample.metadata["evaluation"] = input.evaluation
    sample.metadata["tools"] = input.args.tools_of_mine
    return GenerateFnOutput(samples=await single(input.args, sample, input.sampling_params))


def _add_arguments(parser):
    parser.add_argument("--tools-of-mine", type=str, default="hammer")


with_input.add_arguments = _add_arguments


async def short_column(args, sample, sampling_params):
    made = await single(args, sample, sampling_params)
    made.loss_mask = made.loss_mask[1:]
    return made


async def unknown_log_prob(args, sample, sampling_params):
    made = await single(args, sample, sampling_params)
    made.rollout_log_probs[-1] = None
    return made


async def nothing(args, sample, sampling_params):
    await single(args, sample, sampling_params)


async def removed(args, sample, sampling_params):
    made = await single(args, sample, sampling_params)
    made.remove_sample = True
    return made


async def without_columns(args, sample, sampling_params):
    made = await single(args, sample, sampling_params)
    made.rollout_log_probs = made.loss_mask = None
    made.weight_versions = []
    return made


async def cut_by_hand(args, sample, sampling_params):
    """Keeps the first three tokens of an answer and goes on by itself."""
    made = await single(args, sample, sampling_params)
    made.strip_last_output_tokens(made.response_length - 3, _Bytes())
    made.append_response_tokens(args, tokens=[7, 8], trainable=False, text="!")
    return made


class _Bytes:
    def decode(self, tokens):
        return "x" * len(tokens)


async def blocking(args, sample, sampling_params):
    """Asks without `post`, and holds its own event loop up while it waits."""
    sample.tokens = GenerateState(args).tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]
    body = {"input_ids": sample.tokens, "sampling_params": sampling_params, "return_logprob": True}
    request = urllib.request.Request(
        get_model_url(args, "policy"), json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        output = json.loads(reply.read())
    drawn = output["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        args, tokens=[e[1] for e in drawn], log_probs=[e[0] for e in drawn], meta_info=output["meta_info"]
    )
    return sample


async def asks_wrongly(args, sample, sampling_params):
    await post(get_model_url(args, "policy"), {"input_ids": [1], "sampling_params": {"regex": "[0-9]+"}})


async def looks_around(args, sample, sampling_params):
    base = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    sample.metadata["model"] = await get(f"{base}/model_info")
    sample.metadata["models"] = await get(f"{base}/v1/models")
    chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 20}
    sample.metadata["said"] = await post(f"{base}/v1/chat/completions", chat)
    for path in ("update_weights_from_disk", "pause_generation", "abort_request", "release_memory_occupation"):
        try:
            await post(f"{base}/{path}", {})
        except Exception as error:
            sample.metadata.setdefault("refused", []).append(error.status)
    return await single(args, sample, sampling_params)


async def asks_for_what_nobody_knows(args, sample, sampling_params):
    assert getattr(args, "flux_capacitor", None) is None
    return args.flux_capacitor


def note_step(args, sample, *, rollout_id, evaluation):
    sample.metadata["hooked"] = [rollout_id, evaluation]


async def double_reward(args, sample):
    return copy.copy(sample)
