"""Who the clients of a run are, and where: in this process, in workers on this machine, or at sites."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedmllm.algorithms import build_algorithm
from fedmllm.benchmark.resident import Resident
from fedmllm.benchmark.worker import client_app, resident_worker
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData, spread
from fedmllm.engine.checkpoint import write_atomically
from fedmllm.engine.flower import FlowerEngine, ask, require_flower, simulation
from fedmllm.engine.messages import Presence, read_presence, write_question
from fedmllm.engine.rounds import Engine, Stage
from fedmllm.engine.sites import ServerConfig
from fedmllm.engine.superlink import RunGrid, serving
from fedmllm.errors import ConfigError, FederationError, listing
from fedmllm.types import ClientFailure, Holding


@dataclass(frozen=True)
class Federation:
    """The clients of a run.

    Attributes:
        experiment: of the run.
        data: their samples, or what they say of them, and the test split, which is here.
        ranks: LoRA ranks that sites ask for.
        grid: what leads to sites; None where there are none.
    """

    experiment: Experiment
    data: FederatedData
    ranks: Mapping[str, int] = field(default_factory=dict)
    grid: RunGrid | None = None

    @contextmanager
    def engine(self, stage: Stage, folder: Path) -> Iterator[Engine | None]:
        """Trains the clients where they are; None for here. Baselines are not of the federation and train here."""
        e, about = self.experiment.engine, {"experiment": settings(self.experiment)}
        if self.grid is not None:
            yield FlowerEngine(self.grid, stage.name, about | {"run": _run_id(folder)}, self.grid.online)
        elif e.name == "flower":
            states = folder.resolve() / "checkpoints" / f"{stage.name}-clients"
            with simulation(client_app(resident_worker), stage.clients_per_round, e.worker_cpus, e.worker_gpus) as (grid, nodes):
                yield FlowerEngine(grid, stage.name, about | {"states": str(states)}, lambda names: dict(zip(names, nodes, strict=False)))
        else:
            yield None


@contextmanager
def federation(experiment: Experiment, held: Resident) -> Iterator[Federation]:
    """The clients of an experiment, for the time of a block.

    Raises:
        ConfigError: if settings and sites do not fit each other, or Flower is not installed.
        FederationError: if sites cannot be reached, or one says what is wrong there.
    """
    if experiment.engine.server is not None:
        with _sites(experiment, held, ServerConfig.load(experiment.engine.server)) as found:
            yield found
        return
    if experiment.engine.name == "flower":
        require_flower("ray")
    yield Federation(experiment, spread(held.dataset(experiment), experiment.federation, experiment.seed))


@contextmanager
def _sites(experiment: Experiment, held: Resident, server: ServerConfig) -> Iterator[Federation]:
    require_flower()
    _require_fit(experiment, server)
    with serving(server.link) as grid:
        present = _present(experiment, server.sites, grid)
        trial = {told.trial for told in present.values()}
        if len(trial) > 1:
            own = [name for name, told in present.items() if not told.trial]
            raise FederationError(f"of the sites only {', '.join(own)} have data of their own; set data in every site.yaml, or in none")
        ranks = {name: told.rank for name, told in present.items() if told.rank is not None}
        _require_ranks(experiment, ranks)
        dataset = held.dataset(experiment)
        if trial == {True}:
            data = spread(dataset, experiment.federation, experiment.seed)
        else:
            _require_own(experiment)
            holdings = {name: Holding(told.num_samples, told.profile) for name, told in present.items()}
            data = FederatedData(dataset, dict.fromkeys(holdings, ()), 0, holdings)
        yield Federation(experiment, data, ranks, grid)


def _require_fit(experiment: Experiment, server: ServerConfig) -> None:
    count, sites = experiment.federation.num_clients, len(server.sites)
    if count != sites:
        raise ConfigError(f"federation.num_clients: {count}, but {server.folder / 'server.yaml'} names {sites} sites; make them the same")
    if experiment.failures.deadline is None:
        raise ConfigError("failures.deadline: with sites a round needs one, e.g. failures.deadline=600; nothing waits for ever")
    if build_algorithm(experiment.algorithm).personalized:
        raise ConfigError(
            f"algorithm.name: {experiment.algorithm.name} is scored by the clients' own models, which stay at their sites; use another method"
        )


def _require_ranks(experiment: Experiment, ranks: Mapping[str, int]) -> None:
    if ranks and not build_algorithm(experiment.algorithm).heterogeneous_ranks:
        raise ConfigError(
            f"algorithm.name: {experiment.algorithm.name} needs one rank everywhere, but {', '.join(ranks)} ask for their own"
        )
    if too_large := {name: rank for name, rank in ranks.items() if rank > experiment.lora.r}:
        raise ConfigError(f"lora.r: {experiment.lora.r} is the largest rank, but sites ask for more: {too_large}")


def _require_own(experiment: Experiment) -> None:
    """What needs the clients' samples here."""
    if needs := [name for name in experiment.evaluation.baselines if name != "zero_shot"]:
        raise ConfigError(f"evaluation.baselines: {', '.join(needs)} need the sites' samples, which stay there; leave zero_shot only")
    if experiment.evaluation.client_samples:
        raise ConfigError("evaluation.client_samples: needs to know the sites' samples, which stay there; leave it out")


def _present(experiment: Experiment, sites: Sequence[str], grid: RunGrid) -> dict[str, Presence]:
    """What every site says of itself, once it has loaded model and data; asked again, if failures.below is to wait, until all have."""
    about, policy = {"experiment": settings(experiment)}, experiment.failures
    found: dict[str, Presence] = {}
    problems: dict[str, str] = {}
    for _ in range(policy.attempts if policy.below == "wait" else 1):
        questions = [(name, write_question(name, about)) for name in sites if name not in found]
        for name, content in ask(grid, "query", questions, grid.online(sites), policy.deadline):
            told = content if isinstance(content, ClientFailure) else read_presence(content, name)
            if isinstance(told, ClientFailure):
                problems[name] = told.reason
            else:
                found[name] = told
        if len(found) == len(sites):
            return {name: found[name] for name in sites}
        time.sleep(policy.pause if policy.below == "wait" else 0)
    reasons = listing(f"{name}: {problems[name]}" for name in sites if name not in found)
    raise FederationError(f"not all sites are there:\n{reasons}\nstart them with fedmllm site up, or have failures.below wait")


def settings(experiment: Experiment) -> str:
    """The experiment as workers are told it: without paths of this machine."""
    engine = experiment.engine.model_copy(update={"server": None})
    data = experiment.data if experiment.engine.server is None else experiment.data.model_copy(update={"root": None})
    return experiment.model_copy(update={"engine": engine, "data": data}).to_yaml()


def _run_id(folder: Path) -> str:
    """Names the run at its sites, so that what they keep of it is not taken for another's; the same when it is resumed."""
    path = folder / "checkpoints" / "run"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(8).encode())
    return path.read_text()
