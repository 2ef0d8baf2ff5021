"""Measurements: quality, bytes and speed, and the text that they use."""
