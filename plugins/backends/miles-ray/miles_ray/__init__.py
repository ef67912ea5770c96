"""Ray as an executor of miles runs."""
