"""Local training on a client's samples. It contains the only local training loop."""
