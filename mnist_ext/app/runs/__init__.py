"""The folder of a run: what training writes to it, and what other commands read from it."""
