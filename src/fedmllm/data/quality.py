"""What can be wrong with a sample beyond a lost modality: poor pictures, poor texts, pairs that do not belong together.

A part is a small pure function ``(sample, client, strength, generator) -> sample``. It is written ``KIND-SHARE``, e.g. ``blur-0.3``:
three samples in ten are blurred; ``blur-0.3:4`` says how strongly, and ``blur-0.3@client`` that all samples of three clients
in ten are. Parts apply in the order given, before the scenario takes modalities away. Pictures are edited when they are
decoded, so that nothing is stored.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fedmllm.errors import ConfigError
from fedmllm.randomness import generator, uniform
from fedmllm.registry import index
from fedmllm.types import Content, Edit, EditedImage, Modality, Sample

Rng = np.random.Generator
Alter = Callable[[Sample, Sequence[Sample], float, Rng], Sample]
"""The sample, all samples of its client, the strength and a generator of the sample's own."""


def _picture(name: str) -> Alter:
    """An edit of ``images.EDITS`` on the sample's picture."""

    def alter(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
        picture = sample.content["image"]
        edit = Edit(name, strength, int(rng.integers(2**63)))
        if isinstance(picture, EditedImage):
            return _with(sample, "image", replace(picture, edits=(*picture.edits, edit)))
        return _with(sample, "image", EditedImage(Path(picture) if isinstance(picture, str) else picture, (edit,)))

    return alter


def typos(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """Each letter is, at a rate of ``strength``, left out, doubled, or replaced by another."""

    def mistyped(letter: str) -> str:
        if not letter.isalpha() or rng.random() >= strength:
            return letter
        return ("", letter * 2, str(rng.choice(list(string.ascii_lowercase))))[rng.integers(3)]

    return _with(sample, "text", "".join(map(mistyped, str(sample.content["text"]))) or str(sample.content["text"]))


def truncation(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """The last words, a share of ``strength``, are cut off; one word stays."""
    words = str(sample.content["text"]).split()
    return _with(sample, "text", " ".join(words[: max(1, round(len(words) * (1 - strength)))]))


_CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопкрстувшхыз")


def wrong_language(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """A share of ``strength`` of the words is written in Cyrillic letters: a stand-in for a language the model was not taught."""
    words = str(sample.content["text"]).split()
    return _with(sample, "text", " ".join(word.lower().translate(_CYRILLIC) if rng.random() < strength else word for word in words))


def misaligned(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """The text is exchanged for that of another sample of the same client: picture and text no longer belong together."""
    others = [other for other in client if other.id != sample.id and "text" in other.content]
    return _with(sample, "text", others[rng.integers(len(others))].content["text"]) if others else sample


def _with(sample: Sample, modality: Modality, value: Content) -> Sample:
    return replace(sample, content={**sample.content, modality: value})


@dataclass(frozen=True)
class PartEntry:
    """A row of the index.

    Attributes:
        alter: the function.
        needs: modalities a sample must hold; others stay as they are.
        summary: one line.
        strength: the default, and its bounds (both included).
    """

    alter: Alter
    needs: tuple[Modality, ...]
    summary: str
    strength: float
    bounds: tuple[float, float]


PARTS: Mapping[str, PartEntry] = index(
    "heterogeneity",
    {
        "blur": PartEntry(_picture("blur"), ("image",), "out of focus; strength: radius in percent of the shorter side", 4, (0, 100)),
        "noise": PartEntry(_picture("noise"), ("image",), "sensor noise; strength: standard deviation in gray levels of 255", 40, (0, 255)),
        "occlusion": PartEntry(_picture("occlusion"), ("image",), "a gray box; strength: share of the area hidden", 0.25, (0, 1)),
        "low_resolution": PartEntry(
            _picture("low_resolution"), ("image",), "few pixels; strength: how many times fewer a side", 4, (1, 1000)
        ),
        "typos": PartEntry(typos, ("text",), "mistyped letters; strength: share of the letters", 0.1, (0, 1)),
        "truncation": PartEntry(truncation, ("text",), "the end is cut off; strength: share of the words", 0.5, (0, 1)),
        "wrong_language": PartEntry(wrong_language, ("text",), "foreign letters; strength: share of the words", 1, (0, 1)),
        "misaligned": PartEntry(misaligned, ("image", "text"), "the text of another sample; strength is not used", 1, (1, 1)),
    },
)

_SPEC = re.compile(r"(?P<kind>[a-z_]+)(-(?P<share>[0-9.]+))?(:(?P<strength>[0-9.]+))?(?P<by>@client)?")


@dataclass(frozen=True)
class Part:
    """A part as configured: what is done to which share of the samples, or of the clients."""

    kind: str
    share: float
    strength: float
    by_client: bool

    def __call__(self, client: str, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """The client's samples, each altered if its own draw, or the client's, says so."""
        entry, hit = PARTS[self.kind], self._draw(seed, client)

        def altered(sample: Sample) -> Sample:
            chosen = hit if self.by_client else self._draw(seed, sample.id)
            if not chosen or not set(entry.needs) <= set(sample.content):
                return sample
            return entry.alter(sample, samples, self.strength, generator(seed, "alter", self.kind, sample.id))

        return [altered(sample) for sample in samples]

    def _draw(self, seed: int, key: str) -> bool:
        return uniform(seed, "part", self.kind, key) < self.share


def parse_part(text: str) -> Part:
    """``"blur-0.3:4@client"`` to a part; the share defaults to 1, the strength to the kind's own.

    Raises:
        ConfigError: if the kind is unknown or a number out of range.
    """
    match = _SPEC.fullmatch(text)
    if match is None or match["kind"] not in PARTS:
        raise ConfigError(f"{text!r} is no kind of heterogeneity; known: {', '.join(PARTS)}, written KIND-SHARE[:STRENGTH][@client]")
    entry = PARTS[match["kind"]]
    try:
        share, strength = float(match["share"] or 1), float(match["strength"] or entry.strength)
    except ValueError:
        raise ConfigError(f"{text!r}: share and strength must be numbers, e.g. blur-0.3:4") from None
    low, high = entry.bounds
    if not 0 <= share <= 1 or not low <= strength <= high:
        raise ConfigError(f"{text!r}: the share must lie in [0, 1] and the strength of {match['kind']} in [{low:g}, {high:g}]")
    return Part(match["kind"], share, strength, match["by"] is not None)
