"""The one logger of miles."""

import logging

logger = logging.getLogger("miles")
