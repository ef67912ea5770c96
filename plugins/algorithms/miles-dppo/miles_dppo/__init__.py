"""Divergence proximal policy optimisation for miles: a trust region of probabilities, not of ratios."""
