"""Predictions of a model on samples, and their scores."""
