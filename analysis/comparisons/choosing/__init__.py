"""Choices before a grid runs: settings by tuning, and the measurement with the least noise."""
