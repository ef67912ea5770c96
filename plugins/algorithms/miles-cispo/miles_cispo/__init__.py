"""CISPO for miles: every token learns, with a clipped and detached importance weight."""
