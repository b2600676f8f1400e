"""What an audit found: how well attacks tell members from others, and the epsilon that their guesses rule out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import ConfigDict

from fedmllm.privacy.membership import Floats, attack, auc_error, lower_bound
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.types import Record

AuditUnit = Literal["sample", "client"]
FEWEST = 5
"""Members and others that a group must have to be listed."""
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Coin:
    """One training sample of the audited run.

    Attributes:
        client: the client that holds it.
        modalities: its modalities, joined by ``+``.
        member: whether the twin trains on it.
    """

    client: str
    modalities: str
    member: bool


@dataclass(frozen=True)
class AttackScore:
    """The success of an attack on a group of units.

    Attributes:
        auc: probability that a member scores above another unit; 0.5 is chance.
        error: standard error of ``auc``.
        tpr: share of members found at a false positive rate of at most 1%.
        members, others: sizes of the group's two halves.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    auc: float
    error: float
    tpr: float
    members: int
    others: int


@dataclass(frozen=True)
class AuditResult:
    """The content of ``audit.json``.

    Attributes:
        unit: what a coin decided about.
        seed: the seed of the coins.
        units: number of coins.
        attacks: success on all units, by what the attacker sees: ``adapter`` (the final one, and the one before training) or ``updates`` (the
            global model's change over several stretches of rounds).
        by_modality: success of the attack on the adapter on samples, by their modalities.
        by_client: the same AUC for each client with enough members and others.
        guesses: number of coins that each attack guesses, fixed beforehand.
        correct: the number of right guesses, by attack.
        lower_bound: the epsilon that the better attack rules out with 95% confidence; 0 if it rules out none.
        ceiling: the lower bound if all guesses were right.
        epsilon, delta: the guarantee that the twin states for this unit; None without one.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, allow_inf_nan=False)

    unit: AuditUnit
    seed: int
    units: int
    attacks: dict[str, AttackScore]
    by_modality: dict[str, AttackScore]
    by_client: dict[str, float]
    guesses: int
    correct: dict[str, int]
    lower_bound: float
    ceiling: float
    epsilon: float | None
    delta: float | None

    @property
    def contradicts(self) -> bool:
        """Whether the attack rules out the stated guarantee."""
        return self.epsilon is not None and self.lower_bound > self.epsilon

    def to_record(self) -> Record:
        """Return the content of ``audit.json``."""
        return asdict(self)


def audited(
    unit: AuditUnit, seed: int, coins: Sequence[Coin], scores: Mapping[str, Floats], statement: PrivacyStatement | None
) -> AuditResult:
    """Return the result of attacks.

    Args:
        unit: what a coin decided about.
        seed: the seed of the coins.
        coins: all training samples.
        scores: by attack, one score for each sample, higher for more likely members.
        statement: the guarantee of the twin.
    """
    members = np.array([coin.member for coin in coins])
    by_unit = {name: _of_units(unit, coins, values) for name, values in scores.items()}
    who = _of_units(unit, coins, members.astype(np.float64)) > 0.5
    guesses = max(2, len(who) // 4 * 2 // 2)
    guaranteed = statement if statement is not None and statement.guaranteed and statement.unit == unit else None
    delta = guaranteed.delta if guaranteed else 0.0
    correct = {name: _correct(values, who, guesses) for name, values in by_unit.items()}
    # Each attack gets an equal share of the allowed error, so that the better one may be reported.
    confidence = 1 - (1 - CONFIDENCE) / len(correct)
    return AuditResult(
        unit=unit,
        seed=seed,
        units=len(who),
        attacks={name: _success(values, who) for name, values in by_unit.items()},
        by_modality=_by_modality(coins, scores["adapter"], members),
        by_client=_by_client(coins, scores["adapter"], members),
        guesses=guesses,
        correct=correct,
        lower_bound=max(lower_bound(right, guesses, len(who), delta, confidence) for right in correct.values()),
        ceiling=lower_bound(guesses, guesses, len(who), delta, confidence),
        epsilon=guaranteed.epsilon if guaranteed else None,
        delta=guaranteed.delta if guaranteed else None,
    )


def _of_units(unit: AuditUnit, coins: Sequence[Coin], values: Floats) -> Floats:
    """Return the values by unit: those of samples, or the mean over each client's samples."""
    if unit == "sample":
        return values
    clients = np.array([coin.client for coin in coins])
    return np.array([values[clients == client].mean() for client in sorted(set(clients))])


def _correct(scores: Floats, members: np.ndarray[tuple[int], np.dtype[np.bool_]], guesses: int) -> int:
    """Return the number of right guesses: the highest scores are guessed to be members, as many of the lowest to be others."""
    order = np.argsort(scores, kind="stable")
    others, chosen = order[: guesses // 2], order[len(order) - (guesses - guesses // 2) :]
    return int(members[chosen].sum() + (~members[others]).sum())


def _success(scores: Floats, members: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> AttackScore:
    inside, outside = scores[members], scores[~members]
    found = attack(inside, outside)
    return AttackScore(found.auc, auc_error(found.auc, len(inside), len(outside)), found.tpr, len(inside), len(outside))


def _by_modality(coins: Sequence[Coin], scores: Floats, members: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> dict[str, AttackScore]:
    groups = np.array([coin.modalities for coin in coins])
    return {
        name: _success(scores[groups == name], members[groups == name]) for name in sorted(set(groups)) if _enough(members[groups == name])
    }


def _by_client(coins: Sequence[Coin], scores: Floats, members: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> dict[str, float]:
    clients = np.array([coin.client for coin in coins])
    own = {name: clients == name for name in sorted(set(clients))}
    return {name: _success(scores[rows], members[rows]).auc for name, rows in own.items() if _enough(members[rows])}


def _enough(members: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> bool:
    return bool(min(members.sum(), (~members).sum()) >= FEWEST)
