"""Environments of the Open Reward Standard, through the openreward SDK."""

import os

# Before the SDK is imported, which reads them then. Whoever has set them has the last word.
os.environ.setdefault("OPENREWARD_DISABLE_UPDATE_CHECK", "1")  # a run speaks to nobody but its environments
os.environ.setdefault(
    "OPENREWARD_LOG_LEVEL", "ERROR"
)  # else it prints a line for each trajectory that it cannot upload
