"""PPO with a critic: generalised advantage estimation."""
