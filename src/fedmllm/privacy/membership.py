"""What membership attacks show: how well they tell members from others, and the epsilon that they rule out."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom, rankdata

from fedmllm.errors import ConfigError

Floats = NDArray[np.float64]

_LARGEST = 50.0
"""No audit in practice certifies as much."""


class Attack(NamedTuple):
    """The success of an attack.

    Attributes:
        auc: probability that a member scores above another sample, ties counted half; 0.5 is chance.
        tpr: share of members found at a false positive rate of at most 1%.
    """

    auc: float
    tpr: float


def attack(members: Floats, others: Floats, fpr: float = 0.01) -> Attack:
    """Return how well scores tell members from other samples.

    Args:
        members: scores of samples that were trained on, higher for more likely members.
        others: scores of samples that were not.
        fpr: the false positive rate for ``tpr``.

    Raises:
        ConfigError: if either is empty.
    """
    if not len(members) or not len(others):
        raise ConfigError(f"an attack needs members and other samples, got {len(members)} and {len(others)}")
    ranks = rankdata(np.concatenate([members, others]))[: len(members)]
    auc = (ranks.sum() - len(members) * (len(members) + 1) / 2) / (len(members) * len(others))
    allowed = math.floor(fpr * len(others))
    threshold = np.sort(others)[::-1][allowed] if allowed < len(others) else -math.inf
    return Attack(float(auc), float((members > threshold).mean()))


def auc_error(auc: float, members: int, others: int) -> float:
    """Return the standard error of an AUC (Hanley and McNeil, Radiology 1982).

        se^2 = (A (1 - A) + (m - 1) (A / (2 - A) - A^2) + (n - 1) (2 A^2 / (1 + A) - A^2)) / (m n)

    Args:
        auc: A.
        members: m, the number of members.
        others: n, the number of other samples.
    """
    spread = (members - 1) * (auc / (2 - auc) - auc**2) + (others - 1) * (2 * auc**2 / (1 + auc) - auc**2)
    return math.sqrt(max(0.0, auc * (1 - auc) + spread) / (members * others))


def p_value(correct: int, guesses: int, samples: int, epsilon: float, delta: float) -> float:
    """Return a bound on the probability that an attack on an (epsilon, delta)-private model guesses at least this well.

    Each sample is in or out by a fair coin. The attack guesses some of the coins. Under the guarantee, with p = 1 / (1 + e^-epsilon) and W
    binomial with ``guesses`` and p (Steinke et al., NeurIPS 2023, theorem 5.2):

        P[correct >= v] <= P[W >= v] + 2 samples delta max_{i = 1..v} P[v > W >= v - i] / i

    Args:
        correct: v, the number of correct guesses.
        guesses: the number of guesses.
        samples: the number of coins.
        epsilon: the epsilon of the guarantee.
        delta: the delta of the guarantee.
    """
    p = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, p))
    if not delta or not correct:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, p)) / np.arange(1, correct + 1)
    return min(1.0, tail + 2 * samples * delta * float(below.max()))


def lower_bound(correct: int, guesses: int, samples: int, delta: float = 0.0, confidence: float = 0.95) -> float:
    """Return the largest epsilon that an attack on one run rules out with this confidence; 0 if it rules out none.

    The bound has a ceiling that depends on the number of guesses: ``lower_bound(r, r, m)`` for r guesses.

    Args:
        correct: number of correct guesses.
        guesses: number of guesses, fixed before the coins are seen.
        samples: number of coins.
        delta: the delta of the guarantee.
        confidence: probability that a true bound is found.

    Raises:
        ConfigError: unless ``0 <= correct <= guesses <= samples``.
    """
    if not 0 <= correct <= guesses <= samples:
        raise ConfigError(f"an audit needs correct <= guesses <= samples, got {correct}, {guesses} and {samples}")

    def excess(epsilon: float) -> float:
        return p_value(correct, guesses, samples, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return _LARGEST if excess(_LARGEST) < 0 else float(brentq(excess, 0.0, _LARGEST, xtol=1e-9))
