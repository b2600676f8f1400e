"""Sweeps: train a grid of experiments and compare them over seeds."""
