"""Predictions as numbers: a score needs no more, and can be had of any resample of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import DataError
from fedmllm.evaluation.text import is_right
from fedmllm.types import Prediction, Record, Sample

SIDE_BY_SIDE = ("accuracy", "balanced_accuracy", "macro_f1")
"""What every classification is reported by, whatever its headline: a method may gain in one and lose in another."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Answered:
    """Samples and answers in the order of the test split.

    Attributes:
        metric: ``auc``, ``macro_f1``, ``accuracy``, or ``mixed``: the mean over datasets of each one's own.
        metrics: by dataset of a mixture, its own metric; a single one elsewhere.
        domain: of each sample, the position of its dataset in ``metrics``.
        truth: the right option's position; 1 for free answers.
        guess: for the AUC the last option's probability, of a failure the infinity that counts against it; for the macro-F1 the
            option's position, -1 for a failure; for the accuracy 1 or 0.
    """

    metric: str
    metrics: tuple[str, ...]
    domain: Indices
    truth: Indices
    guess: Floats

    def score(self, chosen: Indices | None = None) -> float:
        """In [0, 1], of all samples or of those chosen, which may repeat.

        Raises:
            DataError: if an AUC is asked of samples of one class only.
        """
        which = slice(None) if chosen is None else chosen
        domain, truth, guess = self.domain[which], self.truth[which], self.guess[which]
        if len(self.metrics) == 1:
            return _SCORES[self.metrics[0]](truth, guess)
        present = [(own, domain == i) for i, own in enumerate(self.metrics) if (domain == i).any()]
        return float(np.mean([_SCORES[own](truth[mask], guess[mask]) for own, mask in present]))

    def hard(self) -> Answered:
        """The same as choices: of every AUC's probability only whether it chooses the last option, as the FedMLLM paper's AUC is computed."""
        chooses = np.where(np.isfinite(self.guess), self.guess > 0.5, self.guess)
        auc = np.array([metric == "auc" for metric in self.metrics])[self.domain]
        return replace(self, guess=np.where(auc, chooses, self.guess))

    def by(self, metric: str) -> Answered | None:
        """The same answers, each dataset of them scored by one of ``SIDE_BY_SIDE``.

        Where the headline is the accuracy only right and wrong are known, and no class: the others are None.
        """
        if metric != "accuracy" and "accuracy" in self.metrics:
            return None
        hard = self.hard().guess
        return replace(self, metrics=(metric,) * len(self.metrics), guess=np.where(np.isfinite(hard), hard, -1.0))


def answered(metric: str, predictions: Sequence[Prediction]) -> Answered:
    """Predictions as numbers.

    Raises:
        DataError: if the metric is the AUC, and samples do not have two options.
    """
    names = sorted({p.sample.domain for p in predictions}) if metric == "mixed" else [""]
    position = {name: i for i, name in enumerate(names)}
    domain = np.array([position[p.sample.domain] if metric == "mixed" else 0 for p in predictions])
    metrics = [own_metric([p.sample for p in predictions if p.sample.domain == name]) if metric == "mixed" else metric for name in names]
    if any(metrics[d] == "auc" and len(p.sample.options) != 2 for d, p in zip(domain, predictions, strict=True)):
        raise DataError("the AUC is defined for two options; use macro_f1 or accuracy for this dataset")
    truth = np.array([1 if metrics[d] == "accuracy" else p.sample.label for d, p in zip(domain, predictions, strict=True)])
    guess = np.array([_GUESSES[metrics[d]](p) for d, p in zip(domain, predictions, strict=True)], dtype=np.float64)
    return Answered(metric, tuple(metrics), domain, truth, guess)


def to_record(models: Sequence[Answered]) -> Record:
    """Several models' answers to the same samples as JSON; a failure, whose guess may be no number, is null."""
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
    """The opposite of ``to_record``."""
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
    """What fits one dataset: AUC for two options, macro-F1 for more, accuracy for free answers."""
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


_GUESSES = {"auc": _positive, "macro_f1": _position, "accuracy": _right}


def _auc(truth: Indices, guess: Floats) -> float:
    """Mann and Whitney's statistic from midranks: P(positive above negative) + P(tie) / 2."""
    positives = int(truth.sum())
    negatives = len(truth) - positives
    if not positives or not negatives:
        raise DataError("the AUC needs samples of both classes; the test split has one only")
    _, inverse, counts = np.unique(guess, return_inverse=True, return_counts=True)
    midranks = np.cumsum(counts) - (counts - 1) / 2
    return float((midranks[inverse][truth == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _macro_f1(truth: Indices, guess: Floats) -> float:
    classes = np.unique(truth)[:, None]
    of_truth, of_guess = classes == truth, classes == guess
    return float(np.mean(2 * (of_truth & of_guess).sum(1) / (of_truth.sum(1) + of_guess.sum(1))))


def _accuracy(truth: Indices, guess: Floats) -> float:
    return float((truth == guess).mean())


def _balanced_accuracy(truth: Indices, guess: Floats) -> float:
    classes = np.unique(truth)[:, None]
    of_truth = classes == truth
    return float(np.mean((of_truth & (classes == guess)).sum(1) / of_truth.sum(1)))


_SCORES = {"auc": _auc, "macro_f1": _macro_f1, "accuracy": _accuracy, "balanced_accuracy": _balanced_accuracy}
