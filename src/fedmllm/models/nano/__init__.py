"""The embedded model: its architecture, what it was pretrained on, and its weights in ``folder``."""
