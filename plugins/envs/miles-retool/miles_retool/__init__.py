"""Reasoning with a Python interpreter: the environment `retool`, its reward, and the sandbox that runs the code."""
