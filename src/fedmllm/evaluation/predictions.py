"""Predictions as numbers, from which scores of many resamples are computed at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fedmllm.data.datasets.base import HEADLINES
from fedmllm.errors import ConfigError, DataError
from fedmllm.evaluation.text import is_right
from fedmllm.types import Prediction, Record, Sample

SIDE_BY_SIDE = ("accuracy", "balanced_accuracy", "macro_f1")
"""Scores reported for every classification, whatever the headline score, because a method may gain in one and lose in another."""

CLASSES = ("auc", "macro_f1")
"""Headline scores for which each option is a class."""

_LARGEST_BATCH = 2**22
"""Maximum number of values held in memory at once for resamples."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Answered:
    """A model's answers as numbers, in the order of the samples.

    Attributes:
        metric: ``auc``, ``macro_f1``, ``accuracy``, a plugin's headline score, or ``mixed``, the mean over datasets of each one's own score.
        metrics: for a mixture with ``mixed``, the score of each dataset; otherwise a single one.
        domain: for each sample, the position of its dataset in ``metrics``.
        truth: for the AUC and macro-F1, the position of the correct option; 1 otherwise.
        guess: for the AUC, the last option's probability, or for a failure the infinity that counts against it; for macro-F1, the
            chosen option's position, or -1 for a failure; for the accuracy, 1 or 0; for a plugin's score, how well the sample is answered.
    """

    metric: str
    metrics: tuple[str, ...]
    domain: Indices
    truth: Indices
    guess: Floats

    def score(self, chosen: Indices | None = None) -> float:
        """Return the score in [0, 1] of all samples, or of the chosen positions, which may repeat.

        Raises:
            DataError: if the score is an AUC and all samples have the same class.
        """
        size = len(self.truth)
        counts = np.ones(size) if chosen is None else np.bincount(chosen, minlength=size).astype(np.float64)
        found = float(self._scores(counts[None])[0])
        if np.isnan(found):
            raise DataError("the AUC needs samples of both classes, but the test split has only one")
        return found

    def resampled(self, rng: np.random.Generator, count: int) -> Floats:
        """Return the scores of ``count`` resamples with replacement (Efron, 1979). Resamples with an undefined AUC are drawn again."""
        size, found = len(self.truth), np.empty(0)
        while len(found) < count:
            batch = min(count - len(found), max(1, _LARGEST_BATCH // size))
            drawn = [np.bincount(rng.integers(size, size=size), minlength=size) for _ in range(batch)]
            scores = self._scores(np.array(drawn, dtype=np.float64))
            found = np.append(found, scores[~np.isnan(scores)])
        return found

    def _scores(self, counts: Floats) -> Floats:
        """Return the score of each resample; NaN if an AUC is undefined.

        Args:
            counts: how often each sample occurs in each resample, shape (resamples, samples).
        """
        total, present = np.zeros(len(counts)), np.zeros(len(counts))
        for i, metric in enumerate(self.metrics):
            own = self.domain == i
            held = counts[:, own].sum(1) > 0
            with np.errstate(invalid="ignore", divide="ignore"):
                scores = _SCORES.get(metric, _mean)(self.truth[own], self.guess[own], counts[:, own])
            total, present = total + np.where(held, scores, 0.0), present + held
        return np.asarray(total / present)

    def hard(self) -> Answered:
        """Replace the probabilities of every AUC with the choice of the last option or not, as in the FedMLLM paper's AUC."""
        chooses = np.where(np.isfinite(self.guess), self.guess > 0.5, self.guess)
        auc = np.array([metric == "auc" for metric in self.metrics])[self.domain]
        return replace(self, guess=np.where(auc, chooses, self.guess))

    def by(self, metric: str) -> Answered | None:
        """Return the same answers with each dataset scored by one of ``SIDE_BY_SIDE``.

        If the headline score is the accuracy, the classes are not known, and every other score is None. If it is a plugin's, the answers
        are not known either.
        """
        if not _GUESSES.keys() >= set(self.metrics):
            return None
        if metric != "accuracy" and "accuracy" in self.metrics:
            return None
        hard = self.hard().guess
        chosen, metrics = np.where(np.isfinite(hard), hard, -1.0), (metric,) * len(self.metrics)
        right = np.where(np.array(self.metrics)[self.domain] == "accuracy", hard, chosen == self.truth)
        if metric == "accuracy":
            return replace(self, metrics=metrics, truth=np.ones_like(self.truth), guess=right)
        return replace(self, metrics=metrics, guess=chosen)


def answered(metric: str, predictions: Sequence[Prediction]) -> Answered:
    """Return predictions as numbers.

    Raises:
        DataError: if the score is an AUC and some samples do not have two options.
        ConfigError: if a plugin's score is not in [0, 1].
    """
    names = sorted({p.sample.domain for p in predictions}) if metric == "mixed" else [""]
    position = {name: i for i, name in enumerate(names)}
    domain = np.array([position[p.sample.domain] if metric == "mixed" else 0 for p in predictions])
    metrics = [own_metric([p.sample for p in predictions if p.sample.domain == name]) if metric == "mixed" else metric for name in names]
    if any(metrics[d] == "auc" and len(p.sample.options) != 2 for d, p in zip(domain, predictions, strict=True)):
        raise DataError("the AUC is defined for two options; use macro_f1 or accuracy for this dataset")
    truth = np.array([p.sample.label if metrics[d] in CLASSES else 1 for d, p in zip(domain, predictions, strict=True)])
    guess = np.array([_guess(metrics[d], p) for d, p in zip(domain, predictions, strict=True)], dtype=np.float64)
    return Answered(metric, tuple(metrics), domain, truth, guess)


def to_record(models: Sequence[Answered]) -> Record:
    """Return several models' answers to the same samples as JSON. Failures become null, because their guess may be infinite."""
    one = models[0]
    failed = [~np.isfinite(a.guess) | (a.guess < 0) for a in models]
    return {
        "metric": one.metric,
        "metrics": list(one.metrics),
        "domain": one.domain.tolist(),
        "truth": one.truth.tolist(),
        "guesses": [
            [None if bad else value for value, bad in zip(a.guess.tolist(), f, strict=True)] for a, f in zip(models, failed, strict=True)
        ],
    }


def from_record(record: Record) -> list[Answered]:
    """Read the output of ``to_record``."""
    metrics, domain, truth = tuple(record["metrics"]), np.array(record["domain"]), np.array(record["truth"])
    worst = {"auc": lambda label: -np.inf if label == 1 else np.inf, "macro_f1": lambda label: -1.0}
    return [
        Answered(
            record["metric"],
            metrics,
            domain,
            truth,
            np.array([worst[metrics[d]](t) if g is None else g for d, t, g in zip(domain, truth, guesses, strict=True)], dtype=np.float64),
        )
        for guesses in record["guesses"]
    ]


def own_metric(samples: Sequence[Sample]) -> str:
    """Return the score that suits a dataset: AUC for two options, macro-F1 for more, accuracy for free answers."""
    options = {len(sample.options) for sample in samples}
    return "accuracy" if 0 in options else "auc" if options == {2} else "macro_f1"


def _positive(prediction: Prediction) -> float:
    if prediction.answer is None:
        return -np.inf if prediction.sample.label == 1 else np.inf
    return prediction.probabilities[-1]


def _position(prediction: Prediction) -> float:
    return -1.0 if prediction.answer is None else float(prediction.sample.options.index(prediction.answer))


def _right(prediction: Prediction) -> float:
    return float(is_right(prediction))


def _guess(metric: str, prediction: Prediction) -> float:
    """Return a prediction as a number. A failure scores 0 under a plugin's score."""
    if metric in _GUESSES:
        return _GUESSES[metric](prediction)
    function = cast(Callable[[Prediction], float], HEADLINES[metric])
    value = 0.0 if prediction.answer is None else float(function(prediction))
    if not 0 <= value <= 1:
        raise ConfigError(
            f"plugins: headline score {metric!r} must be in [0, 1], is {value:g} for sample {prediction.sample.id!r}; rescale it"
        )
    return value


_GUESSES = {"auc": _positive, "macro_f1": _position, "accuracy": _right}


def _auc(truth: Indices, guess: Floats, counts: Floats) -> Floats:
    """Return the Mann-Whitney statistic, P(positive above negative) + P(tie) / 2, of each resample."""
    values, place = np.unique(guess, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts, ranked = np.searchsorted(place[order], np.arange(len(values))), counts[:, order]
    positives, negatives = (np.add.reduceat(ranked * (truth[order] == label), starts, axis=1) for label in (1, 0))
    below = negatives.cumsum(1) - negatives / 2
    return np.asarray((positives * below).sum(1) / (positives.sum(1) * negatives.sum(1)))


def _macro_f1(truth: Indices, guess: Floats, counts: Floats) -> Floats:
    right, of_truth, of_guess = _confusion(truth, guess, counts)
    return _over_classes(2 * right / (of_truth + of_guess), of_truth)


def _balanced_accuracy(truth: Indices, guess: Floats, counts: Floats) -> Floats:
    right, of_truth, _ = _confusion(truth, guess, counts)
    return _over_classes(right / of_truth, of_truth)


def _confusion(truth: Indices, guess: Floats, counts: Floats) -> tuple[Floats, Floats, Floats]:
    """Return, by resample and class, the numbers of correct answers, of samples, and of answers."""
    classes = np.unique(truth)
    of_truth, of_guess = truth[:, None] == classes, guess[:, None] == classes
    return counts @ (of_truth & of_guess), counts @ of_truth, counts @ of_guess


def _over_classes(scores: Floats, of_truth: Floats) -> Floats:
    """Return the mean over the classes that occur in each resample."""
    occurs = of_truth > 0
    return np.asarray(np.where(occurs, scores, 0.0).sum(1) / occurs.sum(1))


def _mean(truth: Indices, guess: Floats, counts: Floats) -> Floats:
    return np.asarray(counts @ guess / counts.sum(1))


_SCORES = {"auc": _auc, "macro_f1": _macro_f1, "accuracy": _mean, "balanced_accuracy": _balanced_accuracy}
"""Scores by name: (truth, guess, how often each sample occurs in each resample) -> score of each resample."""
