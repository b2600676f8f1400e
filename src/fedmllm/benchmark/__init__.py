"""Runs, their results and what is shown of them."""
