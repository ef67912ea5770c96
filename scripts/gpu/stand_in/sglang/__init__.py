"""Where SGLang is not installed: a program of its name, so that scripts for a GPU can be tried without one."""
