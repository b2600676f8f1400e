"""Sweeps: a grid of experiments, trained and compared over seeds."""
