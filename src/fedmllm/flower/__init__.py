"""Training over Flower: messages, workers on this machine, SuperLink and SuperNodes."""
