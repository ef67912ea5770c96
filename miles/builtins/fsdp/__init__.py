"""The train backend `fsdp`: a transformers model on one rank, or sharded over many by FSDP2."""
