"""Soft adaptive policy optimisation for miles: a smooth gate in the place of the clip."""
