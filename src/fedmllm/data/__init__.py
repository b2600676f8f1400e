"""Samples: where they come from, which client holds which, what each lost, how they are worded."""
