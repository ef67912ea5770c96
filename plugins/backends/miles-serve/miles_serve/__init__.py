"""`miles serve`: a rollout engine of miles behind SGLang's HTTP API and an OpenAI-compatible one."""
