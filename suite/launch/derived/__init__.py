"""Runs that are made from trained runs, without training."""
