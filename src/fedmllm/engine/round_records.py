"""What a round's line in the metrics says, and what privacy keeps out of it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import ServerState
from fedmllm.engine.secure import FACTS
from fedmllm.privacy.client_level import WITHHELD
from fedmllm.types import BASE_STEP, Metrics, Record

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Round

_LOG = logging.getLogger(__name__)


def round_record(this: Round, state: ServerState, validation: Metrics | None, scores: Metrics | None, seconds: dict[str, float]) -> Record:
    """Return a finished round's line in ``metrics.jsonl``.

    Args:
        this: the round.
        state: the server state after it.
        validation: scores on the validation split; None if it was not scored.
        scores: scores on the test split; None if it was not scored.
        seconds: the time that the round took, by activity.
    """
    record = {
        "stage": this.stage.name,
        "round": state.round_num,
        "clients": sorted(this.clients),
        "learning_rate": this.assignment.learning_rate,
        "skipped": not this.complete,
        **this.intake.record(),
        **this.facts,
        "score": scores["score"] if scores else None,
        "scores": scores,
        "validation": validation,
        "bytes_down": _bytes_down(this),
    }
    if session := this.facts.get(FACTS):
        record |= {name: record[name] + session[name] for name in ("bytes_up", "bytes_down")}
    record["seconds"] = seconds
    return _published(record, this) if this.loop.privacy or this.loop.withholds else record


def _published(record: Record, this: Round) -> Record:
    """Return the record that may be published, and log what the operator needs to know about failed clients."""
    by_reason: dict[str, list[str]] = {}
    for row in record["refused"]:
        by_reason.setdefault(row["reason"], []).append(row["client"])
    for reason, clients in by_reason.items():
        _LOG.warning("Round %d: no update from %s: %s", record["round"], ", ".join(clients), reason)
    record = {**record, "refused": [{"client": row["client"], "reason": WITHHELD} for row in record["refused"]]}
    sent = {n: t for n, t in this.state.weights.items() if this.loop.algorithm.uploads(this.state.round_num, n)}
    return this.loop.privacy.published(record, W.num_bytes(sent)) if this.loop.privacy else record


def _bytes_down(this: Round) -> int:
    """Return the bytes sent to the cohort plus the last round's change to the frozen weights, which every client receives."""
    algorithm, stage, broadcast = this.loop.algorithm, this.stage, this.assignment.broadcast
    sent = {name: tensor for name, tensor in broadcast.weights.items() if algorithm.downloads(name)}
    extras = {f"{kind}/{n}": tensor for kind, tensors in broadcast.extras.items() for n, tensor in tensors.items()}
    further = {name: tensor for name, tensor in extras.items() if algorithm.downloads(name)}
    own = sum(W.num_bytes(factors.cut(sent, stage.ranks.get(name)), further) for name in _reached(this))
    return own + len(stage.clients) * W.num_bytes(this.state.slots.get(BASE_STEP, {}))


def _reached(this: Round) -> list[str]:
    """Return the clients that received a task; instead of a secret cohort, as many clients as it has in the mean."""
    privacy = this.loop.privacy
    return sorted(this.stage.clients)[: privacy.cohort] if privacy and privacy.secret_cohort else this.intake.reached
