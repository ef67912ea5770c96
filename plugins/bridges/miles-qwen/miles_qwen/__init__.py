"""Qwen2 and Qwen3, dense and mixture of experts."""
