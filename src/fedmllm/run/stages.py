"""The stages of a run: the federation, then the baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmllm.config import Experiment
from fedmllm.engine.stages import Stage
from fedmllm.run.federation import Federation
from fedmllm.types import Sample


def stages_of(experiment: Experiment, federation: Federation) -> list[Stage]:
    """Return the stages of a run: the federation, then the baselines.

    Baselines are centralized training and local training of each client, both also with calibration, and fine-tuning of the final federated
    model at each client.
    """
    baselines, clients = experiment.evaluation.baselines, federation.data.clients
    stages, rounds = [_federated(experiment, federation)], solo_rounds(experiment)
    for name in ("centralized", "calibrated_centralized"):
        if name in baselines:
            stages.append(Stage(name, pooled(clients), rounds, 1))
    for name in ("local", "calibrated_local"):
        if name in baselines:
            stages += [Stage(f"{name}-{client}", {client: samples}, rounds, 1) for client, samples in clients.items()]
    if "fine_tuned" in baselines:
        stages += [Stage(f"fine_tuned-{client}", {client: samples}, 1, 1) for client, samples in clients.items()]
    return stages


def _federated(experiment: Experiment, federation: Federation) -> Stage:
    """Return the federation's stage. A rank that a site sets for itself takes precedence over the experiment's."""
    settings, data = experiment.federation, federation.data
    ranks = {client: experiment.lora.rank_of(i) for i, client in enumerate(sorted(data.clients))}
    own = {client: rank for client, rank in ranks.items() if rank is not None} | dict(federation.ranks)
    every = experiment.evaluation.every
    return Stage("federated", data.clients, settings.num_rounds, settings.clients_per_round, every, own, data.reported, settings.sampling)


def solo_rounds(experiment: Experiment) -> int:
    """Return the mean number of rounds per client, so that every baseline visits each sample equally often."""
    settings = experiment.federation
    return max(1, round(settings.num_rounds * experiment.updates_per_round / settings.num_clients))


def pooled(clients: Mapping[str, Sequence[Sample]]) -> dict[str, tuple[Sample, ...]]:
    """Return all samples at one client with the first client's name, in the order of their ids.

    With a single client the result equals the federation, including name and order, so that training is bit-identical.
    """
    everything = sorted((sample for samples in clients.values() for sample in samples), key=lambda sample: sample.id)
    return {min(clients): tuple(everything)}
