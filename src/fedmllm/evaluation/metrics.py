"""Scores in [0, 1] and their standard errors. A failure, which is an answer that could not be parsed, always counts as wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from statistics import mean, stdev

import numpy as np

from fedmllm.errors import DataError
from fedmllm.evaluation.predictions import CLASSES, SIDE_BY_SIDE, Answered, answered, own_metric
from fedmllm.evaluation.text import free_scores, is_failure, normalize
from fedmllm.randomness import generator
from fedmllm.registry import index
from fedmllm.types import Metrics, Prediction, Sample

BOOTSTRAP_SAMPLES = 200
_BUILT_IN = ("score", "standard_error", "num_samples", "failures", "auc_hard", *SIDE_BY_SIDE, "recall_open", "f1_open", "rouge_l_long")
METRICS: dict[str, Callable[[Sequence[Prediction]], float | None] | None] = index("metric", dict.fromkeys(_BUILT_IN))
"""Metrics reported next to the headline score: None for the package's own; for a plugin's, its function, which returns None if undefined."""


def score(metric: str, predictions: Sequence[Prediction]) -> float:
    """Return the headline score by name: ``auc``, ``macro_f1``, ``accuracy``, ``mixed``, the mean over datasets of each one's own score, or a plugin's."""
    return answered(metric, predictions).score()


def auc(predictions: Sequence[Prediction]) -> float:
    """Return the area under the ROC curve of the last option's probability: P(positive ranked above negative) + P(tie) / 2.

    A failed positive ranks below everything else, and a failed negative above everything else.

    Raises:
        DataError: unless there are two options and samples of both.
    """
    return score("auc", predictions)


def macro_f1(predictions: Sequence[Prediction]) -> float:
    """Return the mean over the classes that occur in the samples of ``2 TP / (2 TP + FP + FN)``. A failure is a false negative."""
    return score("macro_f1", predictions)


def accuracy(predictions: Sequence[Prediction]) -> float:
    """Return the share of correct answers; see ``evaluation.text.is_right``."""
    return score("accuracy", predictions)


def _by_domain(predictions: Sequence[Prediction]) -> dict[str, list[Prediction]]:
    domains = sorted({p.sample.domain for p in predictions})
    return {domain: [p for p in predictions if p.sample.domain == domain] for domain in domains}


def all_metrics(metric: str, predictions: Sequence[Prediction], seed: int) -> Metrics:
    """Return all scores: the headline ``score``, its bootstrap ``standard_error``, ``num_samples``, ``failures``, and ``free_scores``.

    ``accuracy`` is always included. If every sample has the same options, so are ``balanced_accuracy``, the mean over the classes that occur
    of ``TP / (TP + FN)``, and ``macro_f1``. In a mixture each is the mean over datasets, and ``score_DATASET`` is the dataset's own score.

    For an AUC, ``auc_hard`` is the AUC of the chosen options instead of their probabilities, for comparison with numbers published that way.
    """
    whole = answered(metric, predictions)
    numbers: Metrics = {"score": whole.score(), "standard_error": _bootstrap(whole, seed)}
    numbers |= {"num_samples": len(predictions), "failures": sum(map(is_failure, predictions))}
    classes = _classes(whole, predictions)
    numbers |= {name: other.score() for name in SIDE_BY_SIDE if (other := classes.by(name)) is not None}
    if metric == "auc":
        numbers["auc_hard"] = whole.hard().score()
    for domain, part in _by_domain(predictions).items():
        if domain:
            numbers[f"score_{domain}"] = score(own_metric([p.sample for p in part]), part)
    further = {name: value for name, function in METRICS.items() if function and (value := function(predictions)) is not None}
    return further | numbers | free_scores(predictions)


def _classes(whole: Answered, predictions: Sequence[Prediction]) -> Answered:
    """Return the answers as classes if the samples have classes, else as right or wrong."""
    if whole.metric in (*CLASSES, "mixed"):
        return whole
    return answered("macro_f1" if _one_set_of_options(predictions) else "accuracy", predictions)


def _one_set_of_options(predictions: Sequence[Prediction]) -> bool:
    """Return whether all samples have the same options in the same order, so that an option's position is a class."""
    options = {prediction.sample.options for prediction in predictions}
    return len(options) == 1 and options != {()}


def standard_error(metric: str, predictions: Sequence[Prediction], seed: int) -> float:
    """Return the standard deviation of the score over ``BOOTSTRAP_SAMPLES`` resamples of the test samples (Efron, 1979).

    Resamples with an undefined AUC, because one class is missing, are drawn again.
    """
    return _bootstrap(answered(metric, predictions), seed)


def _bootstrap(numbers: Answered, seed: int) -> float:
    return float(np.std(numbers.resampled(generator(seed, "bootstrap"), BOOTSTRAP_SAMPLES)))


def require_scorable(metric: str, samples: Sequence[Sample], what: str) -> None:
    """Check that a score is defined on samples before anything is trained.

    Args:
        metric: the headline score.
        samples: the samples to be scored.
        what: what the samples are, for the error message.

    Raises:
        DataError: if the score is undefined, such as an AUC on samples of one class.
    """
    try:
        score(metric, [Prediction(sample, None) for sample in samples])
    except DataError as error:
        raise DataError(f"{what}: {error}; add samples of the other class, or set another metric") from error


def over_models(rows: Sequence[Metrics]) -> Metrics:
    """Combine the metrics of several models: sum the numbers of samples and failures, and average the rest. Only shared metrics are kept."""
    shared = [key for key in (rows[0] if rows else ()) if all(key in row for row in rows)]
    return {key: (sum if key in ("failures", "num_samples") else mean)(row[key] for row in rows) for key in shared}


def error_over_models(scores: Collection[float]) -> float | None:
    """Return the standard error of a mean over K models: their standard deviation divided by ``sqrt(K)``. None for fewer than two."""
    return stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else None


def majority_score(metric: str, train: Sequence[Sample], test: Sequence[Sample]) -> float:
    """Return the score of always giving the most frequent training answer of the same answer type; 0.5 for the AUC."""
    if metric == "auc":
        return 0.5
    if metric == "mixed":
        return float(np.mean([_majority_in(domain, train, test) for domain in sorted({sample.domain for sample in test})]))
    common = _most_frequent_by(train, lambda sample: sample.answer_type)
    return score(metric, [_given(sample, common.get(sample.answer_type)) for sample in test])


def _majority_in(domain: str, train: Sequence[Sample], test: Sequence[Sample]) -> float:
    learned, asked = ([sample for sample in samples if sample.domain == domain] for samples in (train, test))
    return majority_score(own_metric(asked), learned, asked)


def question_score(metric: str, train: Sequence[Sample], test: Sequence[Sample]) -> float | None:
    """Return the score of a baseline that reads only the question: it gives the question's most frequent training answer.

    To a new question it gives the most frequent answer of its answer type. A model that does not beat this baseline has learned from the
    questions and nothing from images and texts. The score is None where it says nothing: if all test samples have the same question, or the
    score ranks probabilities (AUC, and mixtures of several scores).
    """
    if metric in ("auc", "mixed") or len({_asked(sample) for sample in test}) < 2:
        return None
    common, known = _most_frequent_by(train, lambda sample: sample.answer_type), _most_frequent_by(train, _asked)
    answers = (known.get(_asked(sample), common.get(sample.answer_type)) for sample in test)
    return score(metric, [_given(sample, answer) for sample, answer in zip(test, answers, strict=True)])


def _asked(sample: Sample) -> Hashable:
    return sample.answer_type, " ".join(sample.question.lower().split()), sample.options


def _most_frequent_by(samples: Sequence[Sample], key: Callable[[Sample], Hashable]) -> dict[Hashable, str]:
    groups: dict[Hashable, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(key(sample), []).append(sample)
    return {name: _most_frequent(group) for name, group in groups.items()}


def _given(sample: Sample, answer: str | None) -> Prediction:
    """Return an answer as a certain prediction. It is a failure if it is not among the sample's options."""
    if sample.options and answer not in sample.options:
        return Prediction(sample, None)
    return Prediction(sample, answer, tuple(float(option == answer) for option in sample.options))


def _most_frequent(samples: Sequence[Sample]) -> str:
    """Return the most frequent answer. Free answers are compared after ``normalize`` and returned in their first spelling.

    Ties go to the first answer in alphabetical order.
    """
    keys = [sample.answer if sample.options else normalize(sample.answer) for sample in samples]
    spelling = {key: sample.answer for key, sample in reversed([*zip(keys, samples, strict=True)])}
    counts = Counter(keys)
    return spelling[min(spelling, key=lambda key: (-counts[key], key))]
