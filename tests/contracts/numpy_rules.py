"""Every method's server rule in a few lines of NumPy. A new method adds one row to ``CASES``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedmllm.types import ClientUpdate
from server_rounds import RANK, A, B

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Sent:
    """One client's update in NumPy, with its sample count, its steps and its rank."""

    update: dict[str, Array]
    count: int
    steps: int
    rank: int | None


@dataclasses.dataclass
class Numbers:
    """A reference's state: the weights, what was merged into the frozen weights, and named memory."""

    weights: dict[str, Array]
    base: dict[str, Array] = dataclasses.field(default_factory=dict)
    memory: dict[str, Any] = dataclasses.field(default_factory=dict)
    round_num: int = 0


Reference = Callable[[Numbers, Sequence[Sent]], None]


def shares(sent: Sequence[Sent]) -> Array:
    return np.array([s.count for s in sent]) / sum(s.count for s in sent)


def mean(sent: Sequence[Sent], name: str, p: Array) -> Array:
    return sum((q * s.update[name] for q, s in zip(p, sent, strict=True)), np.zeros(()))


def by_tensor(rule: Callable[[Numbers, Sequence[Sent], str], Array]) -> Reference:
    """A reference that computes each tensor's change separately."""

    def reference(state: Numbers, sent: Sequence[Sent]) -> None:
        added = {name: rule(state, sent, name) for name in state.weights if name in sent[0].update}
        state.weights |= {name: state.weights[name] + change for name, change in added.items()}

    return reference


average = by_tensor(lambda state, sent, name: mean(sent, name, shares(sent)))


plain = by_tensor(lambda state, sent, name: np.mean([s.update[name] for s in sent], axis=0))


def momentum(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    """FedAvgM at its defaults: m <- 0.9 m + D."""
    state.memory[name] = 0.9 * state.memory.get(name, 0.0) + mean(sent, name, shares(sent))
    return np.asarray(state.memory[name])


def adaptive(second: Callable[[Array, Array], Array], beta1: float = 0.9) -> Reference:
    """Reddi et al., Algorithm 2, at the defaults: eta = tau = 1e-3, beta2 = 0.99, beta1 = 0.9 (0 for Adagrad). D is the plain mean."""

    def rule(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
        m, v = state.memory.get(name, (0.0, np.full(state.weights[name].shape, 1e-6)))
        d = np.mean([s.update[name] for s in sent], axis=0)
        m, v = beta1 * m + (1 - beta1) * d, second(v, d * d)
        state.memory[name] = (m, v)
        return np.asarray(1e-3 * m / (np.sqrt(v) + 1e-3))

    return by_tensor(rule)


def nova(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    p = shares(sent)
    tau = sum(q * s.steps for q, s in zip(p, sent, strict=True))
    return np.asarray(tau * sum(q * s.update[name] / s.steps for q, s in zip(p, sent, strict=True)))


def trimmed(state: Numbers, sent: Sequence[Sent], name: str) -> Array:
    """With five clients, one is dropped at each end."""
    return np.asarray(np.sort([s.update[name] for s in sent], axis=0)[1:-1].mean(axis=0))


def krum(state: Numbers, sent: Sequence[Sent]) -> None:
    """With five clients and one Byzantine, a score sums the squared distances to the 5 - 1 - 2 = 2 nearest others."""
    flat = np.array([np.concatenate([s.update[name].ravel() for name in sorted(s.update)]) for s in sent])
    scores = [sorted(((flat[k] - flat[j]) ** 2).sum() for j in range(len(flat)) if j != k)[:2] for k in range(len(flat))]
    best = sent[int(np.argmin([sum(row) for row in scores]))]
    state.weights |= {name: state.weights[name] + best.update[name] for name in best.update}


def own(state: Numbers, s: Sent, name: str) -> Array:
    """A client's trained tensor at its own rank."""
    cut = state.weights[name] if s.rank is None else state.weights[name][: s.rank] if "lora_A" in name else state.weights[name][:, : s.rank]
    return np.asarray(cut + s.update[name])


def product(state: Numbers, sent: Sequence[Sent]) -> Array:
    """The weighted mean of the clients' products."""
    return np.asarray(sum(q * own(state, s, B) @ own(state, s, A) for q, s in zip(shares(sent), sent, strict=True)))


def flora(state: Numbers, sent: Sequence[Sent]) -> None:
    state.base = {"m": state.base.get("m", 0.0) + product(state, sent)}


def fedex(state: Numbers, sent: Sequence[Sent]) -> None:
    whole = product(state, sent)
    average(state, sent)
    state.base = {"m": state.base.get("m", 0.0) + whole - state.weights[B] @ state.weights[A]}


def flexlora(state: Numbers, sent: Sequence[Sent]) -> None:
    """By the SVD of the full matrix, which the method never forms. Directions beyond the cohort's largest rank stay in it."""
    largest = max(s.rank or RANK for s in sent)
    unheld = state.weights[B][:, largest:] @ state.weights[A][largest:]
    u, s, vt = np.linalg.svd(product(state, sent) + unheld, full_matrices=False)
    sign = np.sign(np.take_along_axis(vt[:RANK], np.abs(vt[:RANK]).argmax(1)[:, None], 1))
    state.weights = {A: sign * vt[:RANK], B: (u[:, :RANK] * s[:RANK]) * sign.T}


def hetlora(state: Numbers, sent: Sequence[Sent]) -> None:
    norms = np.array([np.linalg.norm(own(state, s, B) @ own(state, s, A)) for s in sent])
    padded = {name: [np.zeros(state.weights[name].shape) for _ in sent] for name in (A, B)}
    for k, s in enumerate(sent):
        rank = s.rank or RANK
        padded[A][k][:rank], padded[B][k][:, :rank] = own(state, s, A), own(state, s, B)
    before, largest = state.weights, max(s.rank or RANK for s in sent)
    state.weights = {name: np.tensordot(norms / norms.sum(), np.array(rows), axes=1) for name, rows in padded.items()}
    state.weights[A][largest:], state.weights[B][:, largest:] = before[A][largest:], before[B][:, largest:]


def fedilora(state: Numbers, sent: Sequence[Sent]) -> None:
    after = {name: tensor.copy() for name, tensor in state.weights.items()}
    for i in range(RANK):
        having = [s for s in sent if (s.rank or RANK) > i]
        for s, p in zip(having, shares(having) if having else [], strict=True):
            after[A][i] += p * s.update[A][i]
            after[B][:, i] += p * s.update[B][:, i]
    state.weights = after


def yoco(state: Numbers, sent: Sequence[Sent]) -> None:
    """B is the weighted mean. A keeps the principal directions with 0.95 of the squared length."""
    rows = np.array([own(state, s, A).ravel() for s in sent])
    _, s, vt = np.linalg.svd(rows, full_matrices=False)
    kept = int(np.argmax(np.cumsum(s**2) / (s**2).sum() >= 0.95 - 1e-12)) + 1
    a = shares(sent) @ (rows @ vt[:kept].T) @ vt[:kept]
    state.weights = {A: a.reshape(state.weights[A].shape), B: state.weights[B] + mean(sent, B, shares(sent))}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method's server rule in a few lines of NumPy, and the parameters that reduce it to a simpler method."""

    reference: Reference
    neutral: dict[str, float] | None = None
    simpler: str = "fedavg"


CASES: dict[str, Case] = {
    "ditto": Case(average),
    "fedavg": Case(average),
    "fedprox": Case(average, neutral={"proximal_mu": 0.0}),
    "fedavgm": Case(by_tensor(momentum), neutral={"beta1": 0.0}),
    "calibrated_flexlora": Case(flexlora, {"calibration": 0.0}, "flexlora"),
    "fedadagrad": Case(adaptive(lambda v, s: v + s, beta1=0.0)),
    "fedadam": Case(adaptive(lambda v, s: 0.99 * v + 0.01 * s)),
    "fedyogi": Case(adaptive(lambda v, s: v - 0.01 * s * np.sign(v - s))),
    "fedex_lora": Case(fedex),
    "fedilora": Case(fedilora, neutral={"edit_threshold": -1}),
    "fedit": Case(average, neutral={}),
    "fednova": Case(by_tensor(nova)),
    "fedsa_lora": Case(average),
    "ffa_lora": Case(average),
    "flexlora": Case(flexlora),
    "flora": Case(flora),
    "hetlora": Case(hetlora),
    "krum": Case(krum),
    "median": Case(by_tensor(lambda state, sent, name: np.median([s.update[name] for s in sent], axis=0)), {}, "median"),
    "rolora": Case(average),
    "scaffold": Case(plain),
    "trimmed_mean": Case(by_tensor(trimmed)),
    "yoco": Case(yoco),
}


def in_numpy(sent: Sequence[ClientUpdate]) -> list[Sent]:
    return [Sent({n: t.double().numpy() for n, t in s.update.items()}, s.num_samples, int(s.metrics["steps"]), s.rank) for s in sent]
