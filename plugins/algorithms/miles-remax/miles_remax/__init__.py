"""Advantages over the greedy rollout of a prompt: ReMax."""
