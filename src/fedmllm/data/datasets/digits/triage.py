"""digits-triage: which of eight teams should go? Eight unbalanced classes, macro-F1; a counterpart of CrisisMMD.

The generative model, from which samples are drawn and the ceilings computed:

    team            c ~ PRIOR
    image           shows a sector number; its left digit is one of the two digits of zone c // 2 with probability 0.92,
                    otherwise of a random zone. The zone identifies a pair of teams, never a single one.
    text            an eyewitness message about event c % 4 with probability 0.9, otherwise about a random event.
                    The event identifies another pair of teams. Zone and event together identify one team.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.types import Sample

QUESTION = "Which team should go?"
TEAMS = ("boats", "pumps", "tents", "trucks", "cranes", "medics", "drones", "guards")
PRIOR = (0.26, 0.18, 0.15, 0.12, 0.10, 0.08, 0.06, 0.05)
P_ZONE, P_EVENT = 0.92, 0.90
ZONES = ((0, 1), (2, 3), (4, 5), (6, 7))
EVENTS = (
    ("flood", "water", "river", "rain"),
    ("fire", "smoke", "flames", "burning"),
    ("crowd", "people", "families", "children"),
    ("wires", "wall", "roof", "glass"),
)
_WORDINGS = (
    "{word} near the {place}, send help",
    "just saw {word} at the {place}",
    "{place}: {word} everywhere!!",
    "pls hurry, {word} by the {place}",
)
_PLACES = ("school", "bridge", "market", "station", "hotel", "farm")


def generate(index: int, split: Split, rng: np.random.Generator) -> Sample:
    """Draw one sample from the generative model."""
    team = int(rng.choice(len(TEAMS), p=PRIOR))
    zone = team // 2 if rng.random() < P_ZONE else int(rng.integers(4))
    event = team % 4 if rng.random() < P_EVENT else int(rng.integers(4))
    digits = (int(rng.choice(ZONES[zone])), int(rng.integers(10)))
    text = str(rng.choice(_WORDINGS)).format(word=rng.choice(EVENTS[event]), place=rng.choice(_PLACES))
    answer = TEAMS[team]
    return Sample(
        id=f"triage-{split}-{index:06d}",
        question=QUESTION,
        answer=answer,
        options=TEAMS,
        category=answer,
        content={"image": sheet(digits, str(rng.choice(list(INKS))), split, rng), "text": text},
    )


@cache
def ceilings() -> dict[str, float]:
    """Return the best macro-F1 of any rule, in the limit of many test samples.

    A rule assigns a team to every observable cell: (zone), (event) or (zone, event). A single source has 4 cells, and all
    8^4 rules are tried. With both, the 8^16 rules are searched by coordinate ascent, starting from the most probable team
    of each cell and from 20 random rules; all starts reach the same score.
    """
    zone, event = _given_team(4, P_ZONE, lambda c: c // 2), _given_team(4, P_EVENT, lambda c: c % 4)
    both = np.einsum("cz,ce->cze", zone, event).reshape(len(TEAMS), 16)
    prior = np.array(PRIOR)[:, None]
    return {"both": _ascend(prior * both), "image": _exhaust(prior * zone), "text": _exhaust(prior * event)}


def _given_team(cells: int, p_right: float, right_cell: Callable[[int], int]) -> NDArray[np.float64]:
    """Return P(cell | team), shape (teams, cells)."""
    table = np.full((len(TEAMS), cells), (1 - p_right) / cells)
    for team in range(len(TEAMS)):
        table[team, right_cell(team)] += p_right
    return table


def macro_f1(joint: NDArray[np.float64], rule: NDArray[np.int64]) -> float:
    """Return the population macro-F1: the mean over teams of 2 P(correct and predicted) / (P(team) + P(predicted)).

    Args:
        joint: P(team, cell), shape (teams, cells).
        rule: the team predicted in each cell.
    """
    predicted = np.eye(len(joint))[rule]
    hits = (joint.T * predicted).sum(axis=0)
    return float(np.mean(2 * hits / (joint.sum(axis=1) + joint.sum(axis=0) @ predicted)))


def _exhaust(joint: NDArray[np.float64]) -> float:
    return max(macro_f1(joint, np.array(rule)) for rule in product(range(len(joint)), repeat=joint.shape[1]))


def _ascend(joint: NDArray[np.float64]) -> float:
    rng = np.random.default_rng(0)
    starts = [joint.argmax(axis=0), *rng.integers(0, len(joint), size=(20, joint.shape[1]))]
    return max(_climb(joint, start) for start in starts)


def _climb(joint: NDArray[np.float64], rule: NDArray[np.int64]) -> float:
    """Improve one cell at a time until no change helps, and return the score."""
    best, improved = macro_f1(joint, rule), True
    while improved:
        improved = False
        for cell, team in product(range(joint.shape[1]), range(len(joint))):
            candidate = rule.copy()
            candidate[cell] = team
            score = macro_f1(joint, candidate)
            if score > best + 1e-12:
                rule, best, improved = candidate, score, True
    return best
