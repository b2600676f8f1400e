"""Data types shared by all subpackages. They hold data only, with no behavior beyond simple derived properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Modality = str
"""Name of a modality, e.g. ``"image"`` or ``"text"``. Code must not assume that there are only two."""

Weights = dict[str, "Tensor"]
"""Trainable tensors by parameter name; float32 on the server."""

Metrics = dict[str, float]
"""Named numbers, each finite."""

Picture = Union[Path, bytes, "Image", "EditedImage"]
"""An image: the path of a file, the bytes of a file, a decoded image, or an image with pending edits."""

Content = str | Picture
"""Text, or data that must be decoded."""


@dataclass(frozen=True)
class Edit:
    """An edit applied to an image when it is decoded: a key of ``data.images.EDITS``, its strength, and the seed of its noise."""

    name: str
    strength: float
    seed: int


@dataclass(frozen=True)
class EditedImage:
    """An image with edits that are applied in order each time it is decoded."""

    source: Path | bytes | Image
    edits: tuple[Edit, ...]


AnswerType = Literal["choice", "open", "closed"]


@dataclass(frozen=True)
class Sample:
    """One question about some content, and its answer.

    Attributes:
        id: unique within a dataset, and independent of the order of its files.
        question: the question. Scenarios never drop it, because without it there is no task.
        answer: the correct answer; one of ``options`` if there are any.
        content: what the question is about, by modality: ``{"image": Path or PIL image, "text": str}``. Scenarios
            drop entries from it. Other modalities (``audio``, ``video``) are files as well.
        options: the answers to choose from, in the order shown; empty for free-text answers.
        category: the class used for label skew and for counts: the answer in classification, the type of question
            in question answering.
        answer_type: how the answer is scored, and the group under which its score is reported.
        client: the natural holder of the sample (hospital, author, event); empty if the data do not name one.
        domain: the dataset of a mixture that the sample comes from; empty outside mixtures.
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
        """The position of the answer among the options."""
        return self.options.index(self.answer)

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """The modalities of this sample, in alphabetical order."""
        return tuple(sorted(self.content))


@dataclass(frozen=True)
class Part:
    """A piece of a message: text, or content of another modality that the model's processor decodes."""

    type: Modality
    value: Content


@dataclass(frozen=True)
class Message:
    """One message of a chat."""

    role: Literal["system", "user", "assistant"]
    parts: tuple[Part, ...]


Slots = Mapping[str, Weights]
"""Sets of tensors by kind: updates, momentum, control variates, a client's own factors. A method documents the kinds of its own."""
UPDATE = "update"
"""A client's update, or the mean of all in an aggregate."""
WEIGHTS = "weights"
"""A client's weights after training, for methods that combine weights instead of updates."""
PERSONAL = "personal"
"""A client's personalized model, which it keeps if the method trains one beside the update (``LocalRule.personal``)."""
BASE = "base"
"""The sum of all updates merged into the frozen weights, by module and in full size, before scaling by LoRA's alpha / r."""
BASE_STEP = "base_step"
"""The factors of the update that the last round merged into the frozen weights."""

Accepted = Mapping[str, Sequence[int]]
"""By client, the rounds (counted from 0, ascending) in which the server accepted its update."""

Profile = Mapping[str, int]
"""Numbers of samples by their modalities, e.g. ``{"image+text": 12, "text": 3}``."""


LabelCounts = Mapping[str, Mapping[str, int]]
"""How often each answer occurs, by the set of options that it was chosen from (keys as in ``data.labels``)."""


@dataclass(frozen=True)
class Holding:
    """A remote client's self-reported sample counts.

    Attributes:
        num_samples: number of samples; None if the client does not report it.
        profile: sample counts by modality; empty if the client does not report them.
    """

    num_samples: int | None
    profile: Profile = field(default_factory=dict)


@dataclass(frozen=True)
class Population:
    """What the server knows about all clients before the first round.

    Attributes:
        num_clients: number of clients.
        profile: sample counts by modality, summed over clients.
        labels: answer counts, summed over clients. Empty unless the method needs them (``needs_labels``); clients do not report them otherwise.
    """

    num_clients: int = 0
    profile: Profile = field(default_factory=dict)
    labels: LabelCounts = field(default_factory=dict)


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to every client of a round.

    Attributes:
        round_num: the round, counted from 0.
        weights: the global weights that the clients start from.
        extras: other tensors that the method's clients need, such as SCAFFOLD's server control variate.
        base: the sum of all updates merged into the frozen weights so far, by module, before scaling by LoRA's alpha / r.
        base_step: the factors that the last round merged.
        population: what is known about all clients.
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
        update: the client's weights after training minus the weights it received, by parameter name.
        num_samples: number of samples the client trained on; None if the client does not report it.
        metrics: the client's own numbers, e.g. its mean training loss.
        extras: other tensors that the method's server needs.
        profile: the client's sample counts by modality.
        rank: LoRA rank of the client's tensors; None for the server's rank.
        num_bytes: size of the upload, if it differs from the size of the tensors.
        round_num: the round whose broadcast the client trained from; None for the current round.
        packed: the encoded update and extras: kind, then parameter name, then the encoded tensors. Empty if they are sent without encoding.
        held: whether the client holds its tensors back for secure aggregation. ``update`` and ``extras`` are then empty.
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
    held: bool = False

    @property
    def weight(self) -> float:
        """The update's weight in a mean weighted by sample counts; 1 if the client does not report its count."""
        return 1.0 if self.num_samples is None else float(self.num_samples)


@dataclass(frozen=True)
class ClientFailure:
    """A failed request: the client or the transport returned no update.

    Attributes:
        client: the client's id.
        reason: what went wrong, as text.
        reached: whether anything was sent to the client.
    """

    client: str
    reason: str
    reached: bool = True


Answer = ClientUpdate | ClientFailure
"""A client's answer: an update, or the reason why there is none."""


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one sample.

    Attributes:
        sample: the sample.
        answer: the option of highest probability, or the generated text; None if the answer could not be parsed,
            which counts as a failure and never as a class.
        probabilities: one per option, summing to 1; empty for free answers.
    """

    sample: Sample
    answer: str | None
    probabilities: tuple[float, ...] = ()


Record = dict[str, Any]
"""A JSON object."""
