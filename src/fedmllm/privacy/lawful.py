"""Which methods a guarantee allows, and what to use instead of the others."""

from __future__ import annotations

from typing import Any

from fedmllm.algorithms import Algorithm
from fedmllm.algorithms.base import ServerAverage
from fedmllm.errors import ConfigError

SUBSTITUTE = "use ffa_lora, with label_calibration if answers are skewed: it has no product of two noisy factors"
"""The method to use instead. Noise on both LoRA factors is multiplied in their product; ffa_lora trains one of them."""

WITHOUT_PROFILE = "omit modality_coverage, or set adaptivity of adaptive_regularization to 0"
"""How to do without clients' sample counts by modality."""


def require_client_level(algorithm: Algorithm, method: type[Any], name: str) -> None:
    """Check that client-level privacy bounds what one client changes in a method.

    Args:
        algorithm: the method with its strategies.
        method: the method's class.
        name: the method's name, for the error message.

    Raises:
        ConfigError: if not; the message names the reason and a substitute.
    """
    if reason := _reason(algorithm, method):
        raise ConfigError(f"privacy.unit: client does not work with {name}, because {reason}; {_substitute(algorithm, method)}")


def require_sample_level(algorithm: Algorithm, name: str) -> None:
    """Check that nothing but noisy training steps of a method depends on samples. Its loss terms are checked when the model is known.

    Args:
        algorithm: the method with its strategies.
        name: the method's name, for the error message.

    Raises:
        ConfigError: if not; the message names the reason and a remedy.
    """
    if "profile" in algorithm.needs:
        raise ConfigError(f"privacy.unit: sample does not work with {name}, because clients must report their profile; {WITHOUT_PROFILE}")
    if algorithm.needs_labels:
        raise ConfigError(
            f"privacy.unit: sample does not work with {name}, because clients must report how often each answer occurs; omit global_prior"
        )


def _reason(algorithm: Algorithm, method: type[Any]) -> str | None:
    """Return why a method is refused; None if it is not."""
    if method.needs_individual_updates:
        return "the server needs individual updates, which no noise protects"
    if method.personalized:
        return "each client's own model and its scores are not protected"
    if method.client_sends:
        return f"clients also send {', '.join(method.client_sends)}"
    if getattr(method, "fold", None) is not ServerAverage.fold:
        return "the server does not take the plain mean of the updates"
    if algorithm.needs:
        return f"clients must report their {' and '.join(sorted(algorithm.needs))}, which no noise protects"
    if algorithm.needs_labels:
        return "clients must report how often each answer occurs, which no noise protects"
    if reweighing := [transform.name for transform in algorithm.transforms if transform.reweighs]:
        return f"{reweighing[0]} weighs updates by what clients report"
    return None


def require_summable(algorithm: Algorithm, method: type[Any], name: str) -> None:
    """Check that a method's server needs nothing but sums of what clients send.

    Args:
        algorithm: the method with its strategies.
        method: the method's class.
        name: the method's name, for the error message.

    Raises:
        ConfigError: if not; the message names the reason and a substitute.
    """
    reason = None
    if method.needs_individual_updates:
        reason = "the server needs individual updates"
    elif getattr(method, "fold", None) is not ServerAverage.fold:
        reason = "the server does not take the plain mean of the updates"
    elif encoding := [transform.name for transform in algorithm.transforms if transform.codec is not None]:
        reason = f"{encoding[0]} sends encoded updates"
    if reason:
        raise ConfigError(
            f"privacy.secure_aggregation does not work with {name}, because {reason}, which a sum does not show; use {SUMMABLE[method.kind]}"
        )


SUMMABLE = {
    "classic": "fedavg",
    "robust": "fedavg, and accept that a sum cannot be checked for outliers",
    "lora": "ffa_lora or rolora, which are exact",
    "one-shot": "fedavg",
    "personalized": "ditto or fedsa_lora",
}
"""The methods to use instead, by kind."""


def _substitute(algorithm: Algorithm, method: type[Any]) -> str:
    """Return what to use instead: another method, or the same method without a strategy or a strategy's option."""
    own = method()
    if algorithm.needs - own.needs or len(algorithm.transforms) > len(own.transforms):
        return WITHOUT_PROFILE
    if algorithm.needs_labels and not own.needs_labels:
        return "omit global_prior of label_calibration"
    return SUBSTITUTE
