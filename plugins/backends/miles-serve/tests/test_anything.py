"""Whatever a client sends: it is answered or refused, and the next one is served."""

import json
import random

import pytest

PARAMETERS = (
    "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "n", "sampling_seed",
    "ignore_eos", "min_new_tokens", "no_stop_trim", "skip_special_tokens", "regex", "frequency_penalty",
)  # fmt: skip
OPENAI = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "stop", "stop_token_ids", "n", "seed", "ignore_eos",
    "stream", "logprobs", "model", "user", "stream_options", "logit_bias", "min_tokens", "priority",
)  # fmt: skip
SHORT = {"max_new_tokens": 2}
SAID = [{"role": "user", "content": "hello"}]
FORMS = {
    "/generate": (
        {"input_ids": [5, 6, 7], "sampling_params": SHORT},
        ("text", "input_ids", "sampling_params", "rid", "return_logprob", "logprob_start_len", "top_logprobs_num",
         "stream", "return_routed_experts", "routed_experts_start_len", "priority", "return_text_in_logprobs",
         "extra_key", "token_ids_logprob", "input_logprob_temperature", "image_data"),
    ),
    "/v1/completions": ({"prompt": "hello", "max_tokens": 2}, (*OPENAI, "prompt", "echo", "suffix")),
    "/v1/chat/completions": (
        {"messages": SAID, "max_tokens": 2}, (*OPENAI, "messages", "tools", "tool_choice", "top_logprobs", "input_ids")
    ),
    "/tokenize": ({"prompt": "hello"}, ("prompt", "add_special_tokens")),
    "/abort_request": ({"rid": "nobody"}, ("rid", "abort_all")),
    "/update_weights_from_disk": ({"model_path": "/nowhere"}, ("model_path", "weight_version", "load_format")),
    "/release_memory_occupation": ({"tags": ["no such part"]}, ("a", "b")),
    "/pause_generation": ({"mode": "nap"}, ("a", "b")),
}  # fmt: skip
"""Path -> a body that is right or does no harm, and fields of it that are then made up."""


def value(dice, depth=0):
    """Something that JSON can hold, often nearly right."""
    kinds = [
        lambda: None,
        lambda: dice.random() < 0.5,
        lambda: dice.choice([0, 1, 2, 5, -1, 319, 320, 10**6, -(2**63), 2**70]),
        lambda: dice.choice([0.0, 0.5, 1.0, 1e-9, -0.1, 1e308, float("nan"), float("inf")]),
        lambda: dice.choice(["", "hello", "a" * 300, "\u0000", "\ud83d", "é"]),
        lambda: [dice.randrange(320) for _ in range(dice.randrange(6))],
    ]
    if depth < 3:
        kinds.append(lambda: [value(dice, depth + 1) for _ in range(dice.randrange(4))])
        kinds.append(lambda: {dice.choice(PARAMETERS): value(dice, depth + 1) for _ in range(dice.randrange(4))})
    return dice.choice(kinds)()


def body(dice, path):
    right, fields = FORMS[path]
    made = dict(right)
    if path == "/generate" and dice.random() < 0.5:
        made["sampling_params"] = SHORT | {dice.choice(PARAMETERS): value(dice)}
    return made | {dice.choice(fields): value(dice) for _ in range(dice.randrange(1, 3))}


@pytest.mark.parametrize("path", FORMS)
def test_whatever_comes_is_answered_or_refused(lab, shared, path):
    dice = random.Random(path)
    bodies = [body(dice, path) for _ in range(100)]

    async def work(session):
        statuses = []
        for made in bodies:
            reply = await lab.ask(session, "POST", path, data=json.dumps(made))
            assert reply.status in (200, 400, 404), (made, reply.text)
            statuses.append(reply.status)
        return statuses

    statuses = shared.client.run(work)
    assert 400 in statuses
    fine = {"input_ids": [5, 6, 7], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
    assert len(shared.client.post("/generate", fine).json["output_ids"]) == 2
