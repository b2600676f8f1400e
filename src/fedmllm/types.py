"""The nouns that the rooms pass to each other. Data only: no behavior beyond simple derived properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Modality = str
"""Name of a kind of content, e.g. ``"image"`` or ``"text"``. Code never assumes that there are only two."""

Weights = dict[str, "Tensor"]
"""Trainable tensors by parameter name; float32 on the server."""

Metrics = dict[str, float]
"""Named numbers, each finite."""

Picture = Union[Path, bytes, "Image", "EditedImage"]
"""A file, a file's bytes, a picture in memory or one with edits to be made."""

Content = str | Picture
"""Text, or something to be decoded."""


@dataclass(frozen=True)
class Edit:
    """Something done to a picture when it is decoded: a key of ``data.images.EDITS``, how strongly, and the seed of its noise."""

    name: str
    strength: float
    seed: int


@dataclass(frozen=True)
class EditedImage:
    """A picture with edits to be made, in order, each time it is decoded."""

    source: Path | bytes | Image
    edits: tuple[Edit, ...]


AnswerType = Literal["choice", "open", "closed"]


@dataclass(frozen=True)
class Sample:
    """One question about some content, and its answer.

    Attributes:
        id: unique within a dataset, stable under the order of its files.
        question: what is asked. It is never dropped: without it there is no task.
        answer: the right answer, one of ``options`` if there are any.
        content: what the question is about, by modality: ``{"image": Path or PIL image, "text": str}``. A scenario
            drops entries from here. Other modalities (``audio``, ``video``) are files too.
        options: the answers to choose from, in the order shown; empty when the answer is free text.
        category: the class used for label skew and for counting: the answer for classification, the kind of question
            for question answering.
        answer_type: how the answer is scored, and under which heading.
        client: who holds the sample by nature (hospital, author, event); empty where the data do not say.
        domain: which dataset of a mixture the sample comes from; empty elsewhere.
    """

    id: str
    question: str
    answer: str
    content: Mapping[Modality, Content]
    options: tuple[str, ...] = ()
    category: str = ""
    answer_type: AnswerType = "choice"
    client: str = ""
    domain: str = ""

    @property
    def label(self) -> int:
        """Position of the answer among the options."""
        return self.options.index(self.answer)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What this sample holds, in alphabetical order."""
        return tuple(sorted(self.content))


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or content of another modality to be decoded by the model's processor."""

    type: Modality
    value: Content


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


Slots = Mapping[str, Weights]
"""Further tensors of a method by what they are: momentum, controls, a client's own factors."""

Accepted = Mapping[str, Sequence[int]]
"""Rounds, counted from 0 and ascending, by client whose update was accepted in them."""

Profile = Mapping[str, int]
"""How many samples somebody holds by the modalities they have, e.g. ``{"image+text": 12, "text": 3}``."""


LabelCounts = Mapping[str, Mapping[str, int]]
"""How often each answer occurs, by the set of options that it was chosen from, as ``data.labels`` writes it."""


@dataclass(frozen=True)
class Holding:
    """What a client that is elsewhere says it holds: how many samples, None if it withholds that; and how many of which modalities, if it says so."""

    num_samples: int | None
    profile: Profile = field(default_factory=dict)


@dataclass(frozen=True)
class Population:
    """What the server knows about all clients before the first round: how many there are, and what they hold together.

    Attributes:
        num_clients: how many.
        profile: their samples by modalities.
        labels: their answers; empty unless the method asks for them (``needs_labels``), for clients do not tell them otherwise.
    """

    num_clients: int = 0
    profile: Profile = field(default_factory=dict)
    labels: LabelCounts = field(default_factory=dict)


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        round_num: the round, counted from 0.
        weights: the global weights the clients start from.
        extras: further tensors that a method needs at its clients (SCAFFOLD's server control, say).
        base: what has been merged into the frozen weights so far, by module of the adapter, without LoRA's factor alpha / r.
        base_step: factors of the last round's part of it.
        population: of all clients.
    """

    round_num: int
    weights: Weights
    extras: Slots = field(default_factory=dict)
    base: Weights = field(default_factory=dict)
    base_step: Weights = field(default_factory=dict)
    population: Population = field(default_factory=Population)


@dataclass(frozen=True)
class ClientUpdate:
    """What one client sends back.

    Attributes:
        client: the client's id.
        update: client minus what it received, by parameter name.
        num_samples: how many samples the client trained on; None if it withholds that.
        metrics: the client's own numbers, e.g. its mean training loss.
        extras: further tensors that the method's server needs.
        profile: the client's samples by modalities.
        rank: LoRA rank of the client's tensors; None for the server's own.
        num_bytes: size on the way up, where it is not that of the tensors.
        round_num: the round of the broadcast that it answers; None for this one.
        packed: the update and the extras as they are written for the way, by tensor in parts; empty where they go as they are.
    """

    client: str
    update: Weights
    num_samples: int | None
    metrics: Metrics = field(default_factory=dict)
    extras: Slots = field(default_factory=dict)
    profile: Profile = field(default_factory=dict)
    rank: int | None = None
    num_bytes: int | None = None
    round_num: int | None = None
    packed: Mapping[str, Mapping[str, Sequence[Tensor]]] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """What it weighs where clients count by samples: 1 if it withholds how many."""
        return 1.0 if self.num_samples is None else float(self.num_samples)


@dataclass(frozen=True)
class ClientFailure:
    """Instead of an update: what went wrong at a client, or on the way.

    Attributes:
        client: whose.
        reason: in words.
        reached: whether anything was sent to the client.
    """

    client: str
    reason: str
    reached: bool = True


Answer = ClientUpdate | ClientFailure
"""What comes of asking a client."""


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one sample.

    Attributes:
        sample: the sample asked.
        answer: the option of highest probability, or the generated text; None when the answer could not be read,
            which counts as a failure and never as a class.
        probabilities: one per option, summing to 1; empty for free answers.
    """

    sample: Sample
    answer: str | None
    probabilities: tuple[float, ...] = ()


Record = dict[str, Any]
"""A JSON object."""
