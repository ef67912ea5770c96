"""Group sequence policy optimisation for miles: the clipped surrogate of one ratio a sequence."""
