"""Group-relative advantages: GRPO and Dr. GRPO."""
