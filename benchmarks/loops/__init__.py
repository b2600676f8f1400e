"""One federated round of the same work, in our loop and in others. Each module's ``run`` trains a round on request."""
