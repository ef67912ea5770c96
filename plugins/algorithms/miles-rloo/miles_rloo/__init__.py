"""Leave-one-out advantages: RLOO."""
