"""The built-in rollout engine: continuous batching and a prefix cache in plain PyTorch."""
