"""Off-policy sequence masking for miles: bad sequences that the policy has left teach nothing."""
