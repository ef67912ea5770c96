"""miles: reinforcement learning for language models, one plugin at a time.

`miles.train(config, reward=my_function)` runs a whole job in this process; `miles` on the command line does the
same from YAML and flags. Start reading at `miles/loop.py`.
"""

__version__ = "0.1.0"

__all__ = ["__version__", "train"]


def __getattr__(name: str):
    """Import the Python entry on first use, so that `import miles` stays light (PEP 562)."""
    if name == "train":
        from miles.jobs import train

        return train
    raise AttributeError(f"module 'miles' has no attribute {name!r}")
