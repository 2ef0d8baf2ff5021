"""The command line: one file a command, and `cli.py`, which puts them together. No module here imports torch when it is imported."""
