"""One federated round of the same work, by us and by others: each module takes a workload and yields the seconds of a round."""
