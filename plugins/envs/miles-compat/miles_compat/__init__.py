"""Generate functions, rewards and filters written for slime and Miles, unchanged."""
