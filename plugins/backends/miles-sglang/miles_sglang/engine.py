"""SGLang servers behind the protocol of rollout engines."""
