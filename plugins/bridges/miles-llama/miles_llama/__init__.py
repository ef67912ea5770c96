"""Llama, Mistral, and the blocks that families like them are built of."""
