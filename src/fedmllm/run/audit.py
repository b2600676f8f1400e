"""Audits a run's privacy: trains a twin on a random half of the data, then tests how well attacks tell that half from the other.

Comparing training with test samples instead would measure how their labels and modalities differ. The twin has the run's settings. Each unit (a
sample or a client) is in it by a fair coin, so that members and others differ by nothing else, and the right guesses of the coins bound epsilon
from below (Steinke et al., NeurIPS 2023).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmllm.algorithms import ServerState
from fedmllm.config import Experiment
from fedmllm.data.federated import FederatedData
from fedmllm.engine.observer import UNOBSERVED, Observer
from fedmllm.errors import ConfigError, RunError
from fedmllm.files import write_atomically, write_json
from fedmllm.packing import pack, unpack
from fedmllm.randomness import generator
from fedmllm.run.audit_result import AuditResult, AuditUnit, Coin, audited
from fedmllm.run.evidence import GlobalModel, evidence
from fedmllm.run.federation import federation
from fedmllm.run.reader import read_audit
from fedmllm.run.resident import Resident
from fedmllm.run.results import RunResult
from fedmllm.run.train import train
from fedmllm.types import Sample

FOLDER = "audit"
"""Name of the twin's folder in a run folder."""
LOOKS = 5
"""Number of stretches of rounds whose updates are attacked."""


@dataclass(frozen=True)
class Audited:
    """One training sample of the audited run.

    Attributes:
        client: the client that holds it.
        sample: the sample.
        member: whether the twin trains on it.
    """

    client: str
    sample: Sample
    member: bool


def audit(
    run: Path, unit: AuditUnit | None = None, *, seed: int = 0, observer: Observer = UNOBSERVED, resident: Resident | None = None
) -> AuditResult:
    """Train a run's twin, attack it, and write ``audit/audit.json`` in the run folder. An interrupted audit continues.

    Args:
        run: the folder of a finished run.
        unit: what a coin decides about; by default what the run's guarantee protects, and samples without one.
        seed: the seed of the coins.
        observer: receives the twin's progress.
        resident: caches that earlier runs of this process have filled; None for new ones.

    Raises:
        RunError: if the folder is not a finished run, or its audit has other settings.
        ConfigError: if the run's data are at sites.
    """
    experiment, held = _experiment(run), resident or Resident()
    chosen: AuditUnit = unit or ("client" if experiment.privacy.unit == "client" else "sample")
    twin, folder = _twin(experiment), run / FOLDER
    _require_same_coins(folder, chosen, seed)
    if (folder / "audit.json").is_file():
        return read_audit(folder / "audit.json")
    units = _units(twin, held, chosen, seed)
    result = _trained(twin, folder, units, observer, held)
    scores = evidence(twin, held, [row.sample for row in units], _states(folder))
    coins = [Coin(row.client, "+".join(row.sample.modalities) or "none", row.member) for row in units]
    found = audited(chosen, seed, coins, scores, result.privacy)
    write_json(folder / "audit.json", found.to_record())
    return found


def runs_of(folder: Path) -> list[Path]:
    """Return the finished runs of a sweep folder, or the folder itself if it is no sweep.

    Raises:
        RunError: if it is a sweep without a finished run.
    """
    if not (folder / "cells").is_dir():
        return [folder]
    found = sorted(path.parent for path in folder.glob("cells/*/result.json"))
    if not found:
        raise RunError(f"{folder}: the sweep has no finished run; run fedmllm sweep first")
    return found


def _experiment(run: Path) -> Experiment:
    if not (run / "result.json").is_file():
        raise RunError(f"{run}: not a finished run (no result.json); finish it with fedmllm train ... --resume, or name another folder")
    experiment = Experiment.load(run / "config.yaml")
    if experiment.engine.server is not None:
        raise ConfigError(f"{run}: its samples are at sites, where an audit cannot reach them; audit a simulation of the same settings")
    return experiment


def _twin(experiment: Experiment) -> Experiment:
    """Return the twin's settings: the run's, without scores that the audit does not need. A cohort without members skips its round.

    Attacks see what the server releases, which secure aggregation does not change, so that the twin does without. If clients add the noise, the
    twin has as much as the guarantee counts on: that of ``min_clients`` clients.
    """
    evaluation = experiment.evaluation.model_copy(update={"baselines": (), "every": 0, "tested": (), "client_samples": 0})
    engine = experiment.engine.model_copy(update={"name": "in_process"})
    failures = experiment.failures.model_copy(update={"below": "skip", "min_updates": 1})
    plain = {"secure_aggregation": False, "min_clients": None, "noise": "server", "assumed_colluders": 0}
    privacy = experiment.privacy.model_copy(update=plain)
    changes = {"evaluation": evaluation, "engine": engine, "failures": failures, "privacy": privacy}
    return experiment.model_copy(update=changes)


def _require_same_coins(folder: Path, unit: AuditUnit, seed: int) -> None:
    """Refuse to continue an audit with other coins, and record those of a new one."""
    path, coins = folder / ".coins", f"{unit} {seed}"
    if path.is_file() and path.read_text() != coins:
        raise RunError(
            f"{folder}: an audit with unit and seed {path.read_text()!r} was begun there; delete the folder, or use these values"
        )
    write_atomically(path, coins.encode())


def _units(experiment: Experiment, held: Resident, unit: AuditUnit, seed: int) -> list[Audited]:
    """Return all training samples, with their coins."""
    with federation(experiment, held, UNOBSERVED) as found:
        rng, rows = generator(seed, "audit"), []
        for client, samples in sorted(found.data.clients.items()):
            coins = rng.random(len(samples)) < 0.5 if unit == "sample" else np.full(len(samples), rng.random() < 0.5)
            rows += [Audited(client, sample, bool(coin)) for sample, coin in zip(samples, coins, strict=True)]
    return rows


def _trained(experiment: Experiment, folder: Path, units: list[Audited], observer: Observer, held: Resident) -> RunResult:
    """Train the twin, and keep the global weights between the stretches of rounds that are attacked."""
    members = {(row.client, row.sample.id) for row in units if row.member}

    def narrow(data: FederatedData) -> FederatedData:
        kept = {c: tuple(s for s in samples if (c, s.id) in members) for c, samples in data.clients.items()}
        return replace(data, clients=kept)

    def keep(stage: str, num_rounds: int, state: ServerState) -> None:
        if state.round_num in _looks(num_rounds):
            write_atomically(_state_file(folder, state.round_num), pack({"weights": state.weights, "base": state.base}, {}))

    resume = (folder / "config.yaml").is_file()
    watched = replace(observer, stepped=keep)
    return train(experiment, folder, name=FOLDER, resume=resume, observer=watched, resident=held, narrow=narrow)


def _looks(num_rounds: int) -> set[int]:
    """Return the rounds between the stretches that are attacked, from 0 to the last."""
    return {round(number) for number in np.linspace(0, num_rounds, LOOKS + 1)}


def _state_file(folder: Path, round_num: int) -> Path:
    return folder / "states" / f"{round_num}.safetensors"


def _states(folder: Path) -> list[GlobalModel]:
    """Return the global models between the stretches, in order."""
    paths = sorted((folder / "states").glob("*.safetensors"), key=lambda path: int(path.stem))
    groups = [unpack(path.read_bytes())[0] for path in paths]
    return [GlobalModel(found["weights"], found.get("base", {})) for found in groups]
