"""Differential privacy: what releases cost, the durable record of what was spent, and noise that nobody can predict."""
