"""The contract of generate functions, with an agent that asks once."""

from openai import AsyncOpenAI

from miles.testing import GenerateFunctionContract


async def asks_once(base_url, prompt, request_kwargs, metadata):
    async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        await client.chat.completions.create(model="any", messages=prompt, **request_kwargs)


class TestAgent(GenerateFunctionContract):
    name = "agent"
    options = {"function": f"{__name__}:asks_once"}
    bad_options = (
        {"function": "agent"},
        {"port": 70000},
        {"host": "0.0.0.0"},
        {"timeout": 0},
        {"threads": 0},
        {"other_sampling": "obey"},
    )
