"""The embedded model: its architecture, its pretraining, and its weights in ``folder``."""
