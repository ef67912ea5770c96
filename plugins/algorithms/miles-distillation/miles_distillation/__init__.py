"""On-policy distillation: a teacher says of every token that the student wrote what it would have written."""
