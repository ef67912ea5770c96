"""Components that need nothing but torch and transformers, registered through the same hooks as anybody's."""
