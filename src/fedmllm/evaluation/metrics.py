"""Scores, each in [0, 1], and their standard errors. A failure (an answer that could not be read) always counts against."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from statistics import mean, stdev

import numpy as np
from numpy.typing import NDArray

from fedmllm.errors import DataError
from fedmllm.randomness import generator
from fedmllm.types import Metrics, Prediction, Sample

BOOTSTRAP_SAMPLES = 200


def score(metric: str, predictions: Sequence[Prediction]) -> float:
    """The headline score by name: ``auc``, ``macro_f1``, ``accuracy``, or ``mixed``: the mean over datasets of each one's own."""
    return {"auc": auc, "macro_f1": macro_f1, "accuracy": accuracy, "mixed": mixed}[metric](predictions)


def mixed(predictions: Sequence[Prediction]) -> float:
    """Mean over the datasets of a mixture of each one's score by ``own_metric``."""
    return float(np.mean([score(own_metric([p.sample for p in part]), part) for part in _by_domain(predictions).values()]))


def own_metric(samples: Sequence[Sample]) -> str:
    """What fits one dataset: AUC for two options, macro-F1 for more, accuracy for free answers."""
    options = {len(sample.options) for sample in samples}
    return "accuracy" if 0 in options else "auc" if options == {2} else "macro_f1"


def _by_domain(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    domains = sorted({p.sample.domain for p in predictions})
    return {domain: [p for p in predictions if p.sample.domain == domain] for domain in domains}


def auc(predictions: Sequence[Prediction]) -> float:
    """Area under the ROC curve of the last option's probability: P(positive ranked above negative) + P(tie) / 2.

    A failed positive ranks below and a failed negative above everything else.

    Raises:
        DataError: unless there are two options and samples of both.
    """
    if any(len(p.sample.options) != 2 for p in predictions):
        raise DataError("the AUC is defined for two options; use macro_f1 or accuracy for this dataset")
    labels = np.array([p.sample.label for p in predictions])
    if labels.min() == labels.max():
        raise DataError("the AUC needs samples of both classes; the test split has one only")
    return _auc(np.array([_positive(p) for p in predictions]), labels)


def _positive(prediction: Prediction) -> float:
    if prediction.answer is None:
        return -np.inf if prediction.sample.label == 1 else np.inf
    return prediction.probabilities[-1]


def _auc(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    from sklearn.metrics import roc_auc_score

    ranks = np.searchsorted(np.unique(scores), scores)
    return float(roc_auc_score(labels, ranks))


def macro_f1(predictions: Sequence[Prediction]) -> float:
    """Mean over the classes that occur in the test split of ``2 TP / (2 TP + FP + FN)``; a failure is a false negative."""
    truth = np.array([p.sample.label for p in predictions])
    guess = np.array([p.sample.options.index(p.answer) if p.answer is not None else -1 for p in predictions])
    classes = np.unique(truth)
    hits = np.array([np.sum((truth == c) & (guess == c)) for c in classes])
    sizes = np.array([np.sum(truth == c) + np.sum(guess == c) for c in classes])
    return float(np.mean(2 * hits / sizes))


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Share of answers that equal the right one after ``normalize``."""
    return float(np.mean([is_right(p) for p in predictions]))


def is_right(prediction: Prediction) -> bool:
    """Exact match after ``normalize``; a failure is wrong."""
    return prediction.answer is not None and normalize(prediction.answer) == normalize(prediction.sample.answer)


def normalize(answer: str) -> str:
    """Lower case, single spaces, no punctuation at the ends of words: ``"Yes."`` equals ``"yes"``, ``"x-ray"`` stays."""
    words = (word.strip(string.punctuation) for word in answer.lower().split())
    return " ".join(word for word in words if word)


def all_metrics(metric: str, predictions: Sequence[Prediction], seed: int) -> Metrics:
    """Headline ``score``, its bootstrap ``standard_error``, ``num_samples``, ``failures``, and accuracy by answer type."""
    numbers: Metrics = {"score": score(metric, predictions), "standard_error": standard_error(metric, predictions, seed)}
    numbers |= {"num_samples": len(predictions), "failures": sum(p.answer is None for p in predictions)}
    for domain, part in _by_domain(predictions).items():
        if domain:
            numbers[f"score_{domain}"] = score(own_metric([p.sample for p in part]), part)
    for kind in sorted({p.sample.answer_type for p in predictions} - {"choice"}):
        numbers[f"accuracy_{kind}"] = accuracy([p for p in predictions if p.sample.answer_type == kind])
    return numbers


def standard_error(metric: str, predictions: Sequence[Prediction], seed: int) -> float:
    """Standard deviation of the score over ``BOOTSTRAP_SAMPLES`` resamples of the test samples (Efron, 1979).

    Resamples in which an AUC is undefined, for want of one class, are drawn anew.
    """
    rng = generator(seed, "bootstrap")
    scores: list[float] = []
    while len(scores) < BOOTSTRAP_SAMPLES:
        chosen = rng.integers(len(predictions), size=len(predictions))
        with suppress(DataError):
            scores.append(score(metric, [predictions[i] for i in chosen]))
    return float(np.std(scores))


def over_models(rows: Sequence[Metrics]) -> Metrics:
    """What several models' metrics come to: questions and failures summed up, the rest averaged, as far as all have it."""
    shared = [key for key in (rows[0] if rows else ()) if all(key in row for row in rows)]
    return {key: (sum if key in ("failures", "num_samples") else mean)(row[key] for row in rows) for key in shared}


def error_over_models(scores: Collection[float]) -> float | None:
    """Of a mean over K models: their standard deviation divided by ``sqrt(K)``. None for fewer than two."""
    return stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None


def majority_score(metric: str, train: Sequence[Sample], test: Sequence[Sample]) -> float:
    """The score of always giving the most frequent training answer (of the same answer type); 0.5 for the AUC."""
    if metric == "auc":
        return 0.5
    if metric == "mixed":
        return float(np.mean([_majority_in(domain, train, test) for domain in sorted({sample.domain for sample in test})]))
    common = {kind: _most_frequent([s.answer for s in train if s.answer_type == kind]) for kind in {s.answer_type for s in train}}
    return score(metric, [Prediction(sample, common.get(sample.answer_type)) for sample in test])


def _majority_in(domain: str, train: Sequence[Sample], test: Sequence[Sample]) -> float:
    learned, asked = ([sample for sample in samples if sample.domain == domain] for samples in (train, test))
    return majority_score(own_metric(asked), learned, asked)


def _most_frequent(answers: Sequence[str]) -> str:
    """The most frequent answer after ``normalize``, in its first spelling; ties go to the first in the alphabet."""
    spelling = {normalize(answer): answer for answer in reversed(answers)}
    counts = Counter(map(normalize, answers))
    return spelling[min(spelling, key=lambda key: (-counts[key], key))]
