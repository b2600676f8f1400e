"""Training on one client's samples: the only local loop."""
