"""Advantages of maximum likelihood reinforcement learning: MaxRL."""
