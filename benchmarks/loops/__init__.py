"""One federated round of the same work, by us and by others: each module's ``run`` trains one whenever it is told to."""
