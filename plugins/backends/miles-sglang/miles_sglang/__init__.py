"""SGLang as the rollout engine of miles runs."""
