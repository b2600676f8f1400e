"""Asking a model and scoring its answers."""
