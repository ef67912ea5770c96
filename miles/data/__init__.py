"""From files to prompts: readers of rows, and what a row means."""
