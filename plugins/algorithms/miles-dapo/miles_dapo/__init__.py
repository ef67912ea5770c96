"""DAPO: its preset, and the soft overlong penalty."""
