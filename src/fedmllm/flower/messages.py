"""Messages between the server and remote clients: safetensors and plain values, checked before use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import Field, ValidationError

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.algorithms import Algorithm, Codec
from fedmllm.engine.base import Assignment
from fedmllm.flower.facts import Facts, Failed, write_message
from fedmllm.flower.frozen import KeptBase, Missing
from fedmllm.packing import pack, unpack
from fedmllm.types import UPDATE, Broadcast, ClientFailure, ClientUpdate, Population, Record, Slots, Weights

SLACK = 1 << 20
"""Bytes that a message may have in addition to its tensors' data, for tensor names and plain values."""


class TaskFacts(Facts):
    """The plain values of a task.

    Attributes:
        accepted: the last two rounds in which the server accepted the client's update. The client uses what it kept in the last of them.
        base_since: ``Missing.since``.
        session: the server's session, ``Missing.session``.
        about: further values for the worker, e.g. the experiment's settings. The engine does not read them.
    """

    stage: str
    client: str
    round_num: int = Field(ge=0)
    seed: int
    learning_rate: float
    rank: int | None
    num_clients: int
    profile: dict[str, int]
    accepted: list[int] = Field(max_length=2)
    labels: dict[str, dict[str, int]] = Field(default_factory=dict)
    base_since: int | None
    session: str = Field(pattern=r"^[0-9a-f]{8}$")
    about: dict[str, Any]


class AnswerFacts(Facts):
    """The plain values of a client's answer."""

    client: str
    round_num: int = Field(ge=0)
    num_samples: int | None = Field(ge=0, lt=2**40)
    metrics: dict[str, float]
    profile: dict[str, int]
    rank: int | None
    held: bool = False


@dataclass(frozen=True)
class Task:
    """A client's task as it arrives.

    Attributes:
        facts: the plain values.
        weights, extras: the tensors that the server sent, at the client's own rank.
        missing: the part of the change to the frozen weights that the client did not have.
    """

    facts: TaskFacts
    weights: Weights
    extras: Slots = field(default_factory=dict)
    missing: Missing = field(default_factory=Missing)

    def broadcast(self, own: Broadcast, kept: KeptBase) -> Broadcast:
        """Rebuild the server's broadcast: the client's initial values, replaced by what the server sent.

        Args:
            own: the broadcast of the method's state before the first round, which is the same at server and client.
            kept: the change to the frozen weights that the client has stored.

        Raises:
            ValueError: if the server sent tensors that the client's model does not have.
            RunError: if the stored change to the frozen weights is missing.
        """
        weights = {**own.weights, **factors.padded({n: t for n, t in self.weights.items() if n in own.weights}, own.weights)}
        if unknown := sorted(self.weights.keys() - own.weights.keys()):
            raise ValueError(f"the server sent {len(unknown)} tensors that the client's model does not have, e.g. {unknown[0]}")
        extras = {kind: {**own.extras.get(kind, {}), **self.extras.get(kind, {})} for kind in {**own.extras, **self.extras}}
        population = Population(self.facts.num_clients, self.facts.profile, self.facts.labels)
        base = kept.brought_up(self.missing, self.facts.round_num, own.base)
        return Broadcast(self.facts.round_num, weights, extras, base, population=population)


def write_task(assignment: Assignment, stage: str, client: str, about: Mapping[str, Any], missing: Missing) -> bytes:
    """Return a client's task as bytes. It holds the tensors that the client does not have yet, at its own rank."""
    broadcast, method, rank = assignment.broadcast, assignment.algorithm, assignment.ranks.get(client)
    weights = factors.cut({name: tensor for name, tensor in broadcast.weights.items() if method.downloads(name)}, rank)
    extras = {
        f"extras.{kind}": {name: tensor for name, tensor in tensors.items() if method.downloads(f"{kind}/{name}")}
        for kind, tensors in broadcast.extras.items()
    }
    facts = TaskFacts(
        stage=stage,
        client=client,
        round_num=broadcast.round_num,
        seed=assignment.seed,
        learning_rate=assignment.learning_rate,
        rank=rank,
        num_clients=broadcast.population.num_clients,
        profile=dict(broadcast.population.profile),
        accepted=list(assignment.accepted.get(client, ())),
        labels={options: dict(counts) for options, counts in broadcast.population.labels.items()},
        base_since=missing.since,
        session=missing.session,
        about=dict(about),
    )
    steps = {f"step.{number}": step for number, step in missing.steps.items()}
    return pack({"weights": weights, "base": missing.whole, **steps, **extras}, facts.model_dump())


def read_task(content: bytes) -> Task:
    """Read a task from bytes.

    Raises:
        ValueError: if the content is not a task.
    """
    groups, values = unpack(content)
    facts = TaskFacts.model_validate(values)
    extras = {kind.removeprefix("extras."): tensors for kind, tensors in groups.items() if kind.startswith("extras.")}
    steps = {int(kind.removeprefix("step.")): tensors for kind, tensors in groups.items() if kind.startswith("step.")}
    missing = Missing(facts.base_since, steps, groups.get("base", {}), facts.session)
    return Task(facts, groups.get("weights", {}), extras, missing)


def write_answer(answer: ClientUpdate | ClientFailure, round_num: int) -> bytes:
    """Return a client's answer as bytes: its update, with packed tensors if they are compressed, or its failure."""
    if isinstance(answer, ClientFailure):
        return write_message(answer, round_num)
    groups: dict[str, Weights] = {}
    for kind, tensors in () if answer.held else {UPDATE: answer.update, **answer.extras}.items():
        if kind not in answer.packed:
            groups[kind] = tensors
        for name, parts in answer.packed.get(kind, {}).items():
            for i, part in enumerate(parts):
                groups.setdefault(f"{kind}.{i}", {})[name] = part
    facts = AnswerFacts(
        client=answer.client,
        round_num=round_num,
        num_samples=answer.num_samples,
        metrics=answer.metrics,
        profile=dict(answer.profile),
        rank=answer.rank,
        held=answer.held,
    )
    return pack(groups, facts.model_dump())


def write_question(client: str, about: Mapping[str, Any]) -> bytes:
    """Return the request for a client's presence message, as bytes. It has the format of a task without tensors."""
    facts = TaskFacts(
        stage="presence",
        client=client,
        round_num=0,
        seed=0,
        learning_rate=0.0,
        rank=None,
        num_clients=0,
        profile={},
        accepted=[],
        base_since=0,
        session=Missing().session,
        about=dict(about),
    )
    return pack({}, facts.model_dump())


@dataclass(frozen=True)
class Expected:
    """The expected format of a client's answer.

    Attributes:
        tensors: tensors of an update at the client's rank; only their names, shapes and dtypes count.
        kinds: ``update`` and the names of the method's extra tensors; empty if clients hold their tensors back.
        codec: the compressor of the tensors; None for plain float32.
    """

    tensors: Weights
    kinds: Sequence[str]
    codec: Codec | None

    @property
    def largest(self) -> int:
        """Maximum size of an answer in bytes. No codec needs more than 1.5 times the bytes of float32."""
        return SLACK + 2 * len(self.kinds) * W.num_bytes(self.tensors)


def expected(assignment: Assignment, client: str) -> Expected:
    """Return the expected format of a client's answer."""
    method: Algorithm = assignment.algorithm
    if assignment.secure:
        return Expected({}, (), None)
    sent = {name: t for name, t in assignment.broadcast.weights.items() if method.uploads(assignment.broadcast.round_num, name)}
    return Expected(factors.cut(sent, assignment.ranks.get(client)), (UPDATE, *method.client_sends), assignment.chain.codec)


def read_answer(content: bytes, client: str, wanted: Expected) -> ClientUpdate | ClientFailure:
    """Read a client's answer. An answer that cannot be read becomes a failure; ``Intake`` decides whether an update is usable."""
    try:
        groups, facts = unpack(content)
        if "failure" in facts:
            return ClientFailure(client, Failed.model_validate(facts).failure)
        return _update(groups, facts, client, wanted)
    except ValidationError as error:
        return ClientFailure(client, f"the answer cannot be read: {error.error_count()} invalid value(s), e.g. {error.errors()[0]['loc']}")
    except (ValueError, RuntimeError, LookupError, TypeError) as error:
        return ClientFailure(client, f"the answer cannot be read: {error}")


def _update(groups: Mapping[str, Weights], facts: Record, client: str, wanted: Expected) -> ClientUpdate:
    answer = AnswerFacts.model_validate(facts)
    if answer.client != client:
        raise ValueError(f"the answer came from {answer.client!r}, expected {client!r}")
    size = sum(W.num_bytes(tensors) for tensors in groups.values())
    slots = {kind: _unpacked(groups, kind, wanted) for kind in wanted.kinds}
    known = {f"{kind}{part}" for kind in wanted.kinds for part in ("", ".0", ".1")}
    if unknown := sorted(groups.keys() - known):
        raise ValueError(f"the answer has unexpected tensors {unknown}")
    return ClientUpdate(
        client,
        slots.pop(UPDATE, {}),
        answer.num_samples,
        answer.metrics,
        slots,
        answer.profile,
        answer.rank,
        size,
        round_num=answer.round_num,
        held=answer.held,
    )


def _unpacked(groups: Mapping[str, Weights], kind: str, wanted: Expected) -> Weights:
    """Return the tensors of one kind. Checks dtypes, and shapes of packed tensors; ``Intake`` checks the rest."""
    codec = wanted.codec
    if codec is None:
        tensors = groups.get(kind, {})
        for name in tensors.keys() & wanted.tensors.keys():
            _require_alike(f"{kind}: {name}", [tensors[name].dtype], [wanted.tensors[name].dtype])
        return tensors
    found = {}
    for name, like in wanted.tensors.items():
        # Tensors on the meta device give the packed shapes without computing anything.
        shapes = [(part.dtype, part.shape) for part in codec.pack(torch.empty(like.shape, device="meta"))]
        parts = [groups[group][name] for i in range(2) if name in groups.get(group := f"{kind}.{i}", {})]
        _require_alike(f"{kind}: {name}", [(part.dtype, part.shape) for part in parts], shapes)
        found[name] = codec.unpack(parts, like.shape)
    return found


def _require_alike(what: str, found: Sequence[Any], wanted: Sequence[Any]) -> None:
    if list(found) != list(wanted):
        raise ValueError(f"{what} is {found}, expected {wanted}")
