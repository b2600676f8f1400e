"""Rounds: the loop, where clients run, and what is kept to go on after an interruption."""
