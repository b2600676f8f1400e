"""The server's side of secure aggregation in a round: after training, a session brings the sum of the updates that clients hold back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fedmllm.algorithms import Algorithm, ServerState
from fedmllm.engine.base import SecureStage
from fedmllm.errors import FederationError
from fedmllm.privacy.secagg.encoding import Encoding, shares
from fedmllm.privacy.secagg.layout import Layout
from fedmllm.privacy.secagg.messages import STAGES, MaskedVector, Message, RoundId, largest, write
from fedmllm.privacy.secagg.server import Server, Total
from fedmllm.privacy.secagg.statements import SitePublicKey
from fedmllm.privacy.secagg.used import Used
from fedmllm.types import ClientFailure, ClientUpdate, Record, Slots

if TYPE_CHECKING:
    from fedmllm.engine.rounds import Round

_LOG = logging.getLogger(__name__)
FACTS = "secure_aggregation"
"""The field of a round's metrics with what its session did."""


@dataclass(frozen=True)
class SecureAggregation:
    """How the rounds of a run are summed.

    Attributes:
        run: the run's id. A resumed run keeps it.
        encoding: how clients' tensors become integers.
        sites: the clients' public keys.
        min_clients: the smallest number of clients in a sum.
        used: the rounds in which clients were asked to mask. Such a round is never repeated, not even after a crash.
    """

    run: str
    encoding: Encoding
    sites: Mapping[str, SitePublicKey]
    min_clients: int
    used: Used

    def round_id(self, stage: str, round_num: int) -> RoundId:
        """Return what clients mask at most one vector for."""
        return RoundId(self.run, stage, round_num)

    def spent(self, round_id: RoundId) -> str | None:
        """Return why a round can have no session; None if it can."""
        try:
            self.used.require_unused(round_id)
        except FederationError as error:
            return str(error)
        return None


class Session:
    """One round's session.

    Args:
        this: the round, whose clients have trained.
        secure: how it is summed.
    """

    def __init__(self, this: Round, secure: SecureAggregation) -> None:
        self._this, self._secure = this, secure
        self._id = secure.round_id(this.stage.name, this.state.round_num)
        self._layout = layout(this.loop.algorithm, this.state)
        self._bytes = {"bytes_up": 0, "bytes_down": 0}

    def run(self) -> None:
        """Sum the updates and hand the result to the round. If the session fails, the round has no update, and its metrics say why."""
        this, secure = self._this, self._secure
        server: Server | None = None
        try:
            terms = secure.encoding.terms(self._layout)
            server = Server(self._id, shares(this.intake.held), secure.sites, self._layout.length, this.needed, terms)
            total = self._total(server)
        except FederationError as error:
            _LOG.warning("%s", error)
            self._end(server, (), {}, str(error).partition("; clients that left:")[0])
        else:
            self._end(server, total.survivors, self._means(server, total), None)

    def _total(self, server: Server) -> Total:
        loop, stage = self._this.loop, self._this.stage
        for name in STAGES:
            messages = server.begin(name)
            if name == "masked":
                self._secure.used.claim(self._id)
            if name == "unmask" and loop.privacy:
                # The answers to this stage allow the server to release the sum. It counts as released before they arrive.
                loop.privacy.spend(stage.name, self._this.state.round_num + 1, server.survivors)
            self._carry(server, name, messages)
        return server.total()

    def _carry(self, server: Server, name: str, messages: Mapping[str, Message]) -> None:
        """Carry the messages of a stage, and give the answers to the server's side of the protocol."""
        length = self._layout.length if name == "masked" else 0
        limit = largest(len(self._this.intake.held), length)
        left = dict.fromkeys(messages)
        self._this.tell(list(left))
        self._bytes["bytes_down"] += sum(map(size, messages.values()))
        for client, answer in self._this.loop.engine.carry(SecureStage(self._id, name, messages, limit, self._this.assignment.deadline)):
            left.pop(client, None)
            self._this.tell(list(left))
            if isinstance(answer, ClientFailure):
                server.drop(client, answer.reason)
            else:
                self._bytes["bytes_up"] += size(answer)
                server.receive(client, answer)

    def _means(self, server: Server, total: Total) -> Slots:
        """Return the means by kind; with client-level privacy, those that may be released."""
        privacy, encoding = self._this.loop.privacy, self._secure.encoding
        if privacy:
            return privacy.released(encoding.sums(self._layout, total.vector), self._this.state.slots)
        uniform = self._this.loop.algorithm.uniform_extras
        return encoding.means(self._layout, total.vector, total.survivors, server.weights, uniform)

    def _end(self, server: Server | None, survivors: tuple[str, ...], means: Slots, failed: str | None) -> None:
        dropped = server.dropped if server else []
        gone = {row.client: f"left secure aggregation in stage {row.stage}: {row.reason}" for row in dropped}
        self._this.intake.settle(means, survivors, {name: reason for name, reason in gone.items() if name not in survivors})
        for name in gone.keys() & set(survivors):
            _LOG.warning("%s is in the sum, but %s", name, gone[name])
        later = sorted(gone.keys() & set(survivors))
        self._this.facts[FACTS] = facts(len(survivors), later, failed, self._bytes)


def facts(in_sum: int, left_later: list[str], failed: str | None, sent: Mapping[str, int]) -> Record:
    """Return what a round's metrics say about its session.

    Args:
        in_sum: the number of clients in the sum; 0 if there is none.
        left_later: clients in the sum that left before it was unmasked.
        failed: why there is no sum.
        sent: bytes of the session's messages, ``bytes_up`` and ``bytes_down``.
    """
    return {"clients": in_sum, "left_later": left_later, "failed": failed, **sent}


def layout(algorithm: Algorithm, state: ServerState) -> Layout:
    """Return the layout of what a client adds to the sum of a round."""
    sent = {name: torch.zeros_like(t) for name, t in state.weights.items() if algorithm.uploads(state.round_num, name)}
    update = ClientUpdate("", sent, 1, {"steps": 1.0}, dict.fromkeys(algorithm.client_sends, sent))
    return Layout.of(algorithm.fold(state, update)[0])


def size(message: Message) -> int:
    """Return the bytes of a message, without the header of a masked vector."""
    return message.vector.nbytes if isinstance(message, MaskedVector) else len(write(message))
