"""Importance-sampling corrections for the mismatch between rollout and trainer: TIS, MIS, IcePop, M2PO."""
