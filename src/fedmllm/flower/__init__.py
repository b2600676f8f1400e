"""Training over Flower: messages, worker processes on this machine, SuperLink and SuperNodes."""
