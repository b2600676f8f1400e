"""The clients of a run, in this process, in workers on this machine, or at sites."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from fedmllm.algorithms import build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, spread
from fedmllm.engine.base import Engine
from fedmllm.engine.failures import FailureConfig
from fedmllm.engine.in_process import InProcessEngine
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.engine.schedules import build_schedule
from fedmllm.engine.stages import Stage
from fedmllm.errors import ConfigError, FederationError
from fedmllm.files import write_atomically
from fedmllm.flower.carrier import FlowerCarrier
from fedmllm.flower.engine import FlowerEngine
from fedmllm.flower.frozen import BaseHistory
from fedmllm.flower.installed import require_flower
from fedmllm.flower.run_grid import RunGrid, serving
from fedmllm.flower.settings import ServerConfig
from fedmllm.flower.simulation import simulation
from fedmllm.flower.superlink import SuperLink
from fedmllm.privacy.ledger import LEDGER
from fedmllm.privacy.secagg.statements import SitePublicKey
from fedmllm.run.privacy import privacy_plan
from fedmllm.run.resident import Resident
from fedmllm.run.roll_call import RollCall
from fedmllm.run.worker import client_app, resident_worker
from fedmllm.types import Holding


@dataclass(frozen=True)
class Federation:
    """The clients of a run.

    Attributes:
        experiment: the experiment of the run.
        data: the clients' samples, or what sites report about theirs, and the test split, which is on this machine.
        ranks: LoRA ranks that sites set for themselves.
        grid: the connection to the sites; None without sites.
        trial: whether sites train on the experiment's own split in a trial run, without data of their own.
        keys: the sites' public keys, for secure aggregation; empty without it.
        roster: the signed list of these keys, which sites check; empty without secure aggregation.
    """

    experiment: Experiment
    data: FederatedData
    ranks: Mapping[str, int] = field(default_factory=dict)
    grid: RunGrid | None = None
    trial: bool = False
    keys: Mapping[str, SitePublicKey] = field(default_factory=dict)
    roster: str = ""

    @contextmanager
    def engine(self, stage: Stage, folder: Path, here: InProcessEngine) -> Iterator[Engine]:
        """Yield the engine that trains the federation's clients, local or remote.

        Args:
            stage: the federation's stage. Baselines do not use this engine; they train in this process.
            folder: the run folder.
            here: the engine that trains clients in this process.
        """
        e, about = self.experiment.engine, dict[str, Any](experiment=settings(self.experiment))
        history = BaseHistory(folder / "checkpoints" / f"{stage.name}-base")
        if self.grid is not None:
            about |= {"run": run_id(folder), "trial": self.trial}
            yield FlowerEngine(self.grid, stage.name, about, self.grid.online, history, remote=True, roster=self.roster)
        elif e.name == "flower":
            if here.private is not None:
                about |= {"ledger": str(folder.resolve() / LEDGER), "noise_multiplier": here.private.noise_multiplier}
            states = folder.resolve() / "checkpoints" / f"{stage.name}-clients"
            at_once = build_schedule(self.experiment.schedule).concurrent(stage.clients_per_round)
            with simulation(client_app(resident_worker), at_once, e.worker_cpus, e.worker_gpus) as (grid, nodes):
                # Every node can run any client. Round-robin assignment puts clients that train in parallel on different nodes.
                round_robin = cycle(nodes)
                reached = lambda names: {name: next(round_robin) for name in names}  # noqa: E731
                # Flower's simulation holds messages in this process. Twice as many messages as workers keep all workers busy.
                ahead = 2 * math.ceil((os.cpu_count() or 1) / e.worker_cpus)
                yield FlowerEngine(FlowerCarrier(grid), stage.name, about | {"states": str(states)}, reached, history, ahead)
        else:
            yield here


@contextmanager
def federation(experiment: Experiment, held: Resident, observer: Observer = UNOBSERVED) -> Iterator[Federation]:
    """Yield the clients of an experiment. Connections to sites stay open inside the ``with`` block.

    Args:
        experiment: the experiment.
        held: models and data cached from earlier runs of this process.
        observer: receives the sites that the run waits for.

    Raises:
        ConfigError: if settings and sites contradict each other, or Flower is not installed.
        FederationError: if sites cannot be reached, or one reports a problem.
    """
    if experiment.engine.server is not None:
        with _sites(experiment, held, ServerConfig.load(experiment.engine.server), observer) as found:
            yield found
        return
    if experiment.engine.name == "flower":
        require_flower("ray")
    yield Federation(experiment, spread(held.dataset(experiment), experiment.federation, experiment.seed))


@contextmanager
def _sites(experiment: Experiment, held: Resident, server: ServerConfig, observer: Observer) -> Iterator[Federation]:
    require_flower()
    _require_fit(experiment, server)
    roster, keys = server.roster() if experiment.privacy.secure_aggregation else ("", {})
    policy, method = experiment.failures, build_algorithm(experiment.algorithm)
    with serving(_within(server.link, policy)) as grid:
        needed = policy.needed(method.smallest_cohort, experiment.updates_per_round)
        present = RollCall(server.sites, grid, settings(experiment), policy, needed, observer).present()
        trial = {presence.trial for presence in present.values()}
        if len(trial) > 1:
            own = [name for name, presence in present.items() if not presence.trial]
            raise FederationError(f"only some sites have data of their own: {', '.join(own)}; set data in every site.yaml or in none")
        ranks = {name: presence.rank for name, presence in present.items() if presence.rank is not None}
        _require_ranks(experiment, ranks)
        dataset = held.dataset(experiment)
        if trial == {True}:
            data = spread(dataset, experiment.federation, experiment.seed)
        else:
            _require_own(experiment)
            holdings = {name: Holding(presence.num_samples, presence.profile) for name, presence in present.items()}
            data = FederatedData(dataset, dict.fromkeys(server.sites, ()), 0, holdings)
        yield Federation(experiment, data, ranks, grid, trial == {True}, keys, roster)


def _within(link: SuperLink, policy: FailureConfig) -> SuperLink:
    """Limit the link's patience to the deadline of a round."""
    return replace(link, patience=min(link.patience, policy.deadline or link.patience))


def _require_fit(experiment: Experiment, server: ServerConfig) -> None:
    count, sites = experiment.federation.num_clients, len(server.sites)
    if count != sites:
        raise ConfigError(
            f"federation.num_clients: {count}, but {server.folder / 'server.yaml'} names {sites} sites; make the numbers equal"
        )
    if experiment.failures.deadline is None:
        raise ConfigError("failures.deadline: null, but a run with sites needs a limit in seconds; set e.g. failures.deadline=600")
    evaluation = experiment.evaluation
    if build_algorithm(experiment.algorithm).personalized and ("fine_tuned" in evaluation.baselines or evaluation.client_samples):
        raise ConfigError(
            f"evaluation: personalized models of {experiment.algorithm.name} stay at the sites, so evaluation.client_samples and the baseline "
            "fine_tuned cannot use them; omit both"
        )


def _require_ranks(experiment: Experiment, ranks: Mapping[str, int]) -> None:
    if ranks and experiment.privacy.secure_aggregation:
        raise ConfigError(
            f"privacy.secure_aggregation: tensors of different ranks cannot be added, but these sites set their own: {', '.join(ranks)}; omit rank in "
            "site.yaml"
        )
    if ranks and not build_algorithm(experiment.algorithm).heterogeneous_ranks:
        raise ConfigError(
            f"algorithm.name: {experiment.algorithm.name} needs the same rank at all clients, but these sites set their own: {', '.join(ranks)}"
        )
    if too_large := {name: rank for name, rank in ranks.items() if rank > experiment.lora.r}:
        raise ConfigError(f"lora.r: {experiment.lora.r} is the largest possible rank, but sites set larger ones: {too_large}")


def _require_own(experiment: Experiment) -> None:
    """Refuse settings that need the clients' samples on the server."""
    if needs := [name for name in experiment.evaluation.baselines if name != "zero_shot"]:
        raise ConfigError(f"evaluation.baselines: {', '.join(needs)} need the sites' samples, which stay at the sites; keep only zero_shot")
    if build_algorithm(experiment.algorithm).needs_labels:
        raise ConfigError(
            "algorithm.strategies: label_calibration with global_prior needs the label counts of all clients, which sites do not report; "
            "omit global_prior"
        )
    if experiment.evaluation.client_samples:
        raise ConfigError("evaluation.client_samples: needs the sites' samples, which stay at the sites; omit it")


def settings(experiment: Experiment) -> str:
    """Return the experiment as YAML for workers, without paths on this machine."""
    # A site trains in its own process; the address of its server is its own setting.
    at_site = {} if experiment.engine.server is None else {"name": "in_process"}
    engine = experiment.engine.model_copy(update={"server": None, **at_site})
    # A site imports what its own settings name, and nothing that the server asks for.
    plugins = experiment.plugins if experiment.engine.server is None else ()
    data = experiment.data if experiment.engine.server is None else experiment.data.without_paths()
    privacy = experiment.privacy
    if privacy.secure_aggregation and (plan := privacy_plan(experiment)):
        # Sites scale their integers by the noise multiplier, which the server may have found for a budget.
        privacy = privacy.model_copy(update={"noise_multiplier": plan.noise_multiplier})
    return experiment.model_copy(update={"engine": engine, "data": data, "plugins": plugins, "privacy": privacy}).to_yaml()


def run_id(folder: Path) -> str:
    """Return the run's id, by which sites separate what they keep for different runs. A resumed run keeps its id."""
    path = folder / "checkpoints" / "run"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text()
