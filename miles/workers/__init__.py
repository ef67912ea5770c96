"""Worker processes: what lives in one (`host`), how several look to the driver (`group`), how failures cross."""
