"""Rewards for answers that can be checked."""
