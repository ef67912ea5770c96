"""Environments of the Open Reward Standard, through the openreward SDK."""
