"""The clients' side of secure aggregation: updates that clients hold back, and the answers to the stages of a session."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from fedmllm.algorithms import ServerState
from fedmllm.engine.base import Assignment
from fedmllm.errors import ConfigError, FederationError
from fedmllm.privacy.secagg.encoding import Encoding
from fedmllm.privacy.secagg.layout import Layout
from fedmllm.privacy.secagg.messages import DOWN, Message, RoundId
from fedmllm.privacy.secagg.party import Party
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.statements import SiteKey, SitePublicKey
from fedmllm.privacy.secagg.used import Used
from fedmllm.types import BASE, Answer, ClientFailure, ClientUpdate, Slots


@dataclass(frozen=True)
class Identity:
    """What a client is in a session.

    Attributes:
        key: its private key.
        used: the rounds that it has masked a vector for.
        policy: its own limits.
    """

    key: SiteKey
    used: Used
    policy: Policy


@dataclass
class _Held:
    """A client's contribution to a round, until it is masked."""

    round_id: RoundId
    slots: Slots
    uniform: tuple[str, ...]
    party: Party | None = None


class Parties:
    """The clients of this process in secure sessions.

    Args:
        encoding: how tensors become integers.
        identity: client -> its key, its used rounds and its limits.
        sites: the public keys of all clients. A site replaces them with those of the signed list of sites.
    """

    def __init__(self, encoding: Encoding, identity: Callable[[str], Identity], sites: Mapping[str, SitePublicKey]) -> None:
        self.sites = sites
        self._encoding, self._identity = encoding, identity
        self._held: dict[str, _Held] = {}

    def hold(self, assignment: Assignment, update: ClientUpdate) -> Answer:
        """Keep what an update adds to the sum in memory, and return the answer without tensors, or a failure if it cannot be in a sum.

        An update that the client holds of an earlier round is forgotten. A client that adds noise reports nothing else about its data.

        Raises:
            ConfigError: if the task asks for the update itself, or no update of this size can be in a sum.
        """
        if assignment.secure is None:
            raise ConfigError("a task without privacy.secure_aggregation asks for the update itself; nothing is held for it")
        received = assignment.broadcast
        state = ServerState(received.weights, received.round_num, {BASE: received.base}, received.population)
        slots, _ = assignment.algorithm.fold(state, update)
        self._held.pop(update.client, None)
        try:
            self._encoding.require(slots)
        except FederationError as error:
            return ClientFailure(update.client, str(error))
        self._held[update.client] = _Held(assignment.secure, slots, assignment.algorithm.uniform_extras)
        held = replace(update, update={}, extras={}, packed={}, num_bytes=None, held=True)
        # Epsilon against the server covers nothing that a client reports without noise.
        return replace(held, num_samples=None, metrics={}, profile={}) if self._encoding.noisy else held

    def forget(self) -> None:
        """Drop all held updates."""
        self._held.clear()

    def answer(self, client: str, stage: str, message: Message) -> Message:
        """Return a client's answer to a stage's message. The update is forgotten once it is masked.

        Raises:
            FederationError: if the client has no update, or refuses to answer.
        """
        if not isinstance(message, DOWN[stage]):
            raise FederationError(f"the message of stage {stage} is {type(message).__name__}, expected {DOWN[stage].__name__}")
        held = self._held.get(client)
        if held is None:
            raise FederationError(f"{client} holds no update: it restarted after it had trained, or did not train in this round")
        held.party = party = held.party or self._party(client, held)
        if stage != "masked":
            return cast(Message, getattr(party, stage)(message))
        slots, held.slots = held.slots, {}
        inbox: Any = message
        # Without a weight or an update there is no vector; the party then says what is wrong with the message.
        lawful = slots and client in inbox.weights
        vector = self._encoding.vector(slots, client, inbox.weights, held.uniform) if lawful else np.empty(0, np.uint32)
        return party.masked(inbox, vector)

    def _party(self, client: str, held: _Held) -> Party:
        own, terms = self._identity(client), self._encoding.terms(Layout.of(held.slots))
        return Party(client, own.key, self.sites, held.round_id, own.used, own.policy, terms)
