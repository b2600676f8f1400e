"""Corruptions of samples beyond missing modalities: poor images, poor texts, and mismatched pairs.

A corruption is a small pure function ``(sample, client, strength, generator) -> sample``. It is written ``KIND-SHARE``: ``blur-0.3``
blurs three samples in ten. ``blur-0.3:4`` also sets the strength, and ``blur-0.3@client`` blurs all samples of three clients in ten.
Corruptions apply in the order given, before the scenario removes modalities. Images are edited when they are decoded, so that no
edited copies are stored.
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
"""(sample, all samples of its client, strength, generator) -> corrupted sample. Every sample has its own generator."""


def _picture(name: str) -> Alter:
    """Return a corruption that applies an edit of ``images.EDITS`` to the sample's image."""

    def alter(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
        picture = sample.content["image"]
        edit = Edit(name, strength, int(rng.integers(2**63)))
        if isinstance(picture, EditedImage):
            return _with(sample, "image", replace(picture, edits=(*picture.edits, edit)))
        return _with(sample, "image", EditedImage(Path(picture) if isinstance(picture, str) else picture, (edit,)))

    return alter


def typos(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """Drop, double or replace each letter with probability ``strength``."""

    def mistyped(letter: str) -> str:
        if not letter.isalpha() or rng.random() >= strength:
            return letter
        return ("", letter * 2, str(rng.choice(list(string.ascii_lowercase))))[rng.integers(3)]

    return _with(sample, "text", "".join(map(mistyped, str(sample.content["text"]))) or str(sample.content["text"]))


def truncation(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """Cut off the last words, a share of ``strength``, but keep at least one word."""
    words = str(sample.content["text"]).split()
    return _with(sample, "text", " ".join(words[: max(1, round(len(words) * (1 - strength)))]))


_CYRILLIC = str.maketrans("abcdefghijklmnopqrstuvwxyz", "абцдефгхийклмнопкрстувшхыз")


def wrong_language(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """Write each word in Cyrillic letters with probability ``strength``, to imitate a language that the model was not trained on."""
    words = str(sample.content["text"]).split()
    return _with(sample, "text", " ".join(word.lower().translate(_CYRILLIC) if rng.random() < strength else word for word in words))


def misaligned(sample: Sample, client: Sequence[Sample], strength: float, rng: Rng) -> Sample:
    """Replace the text with that of another sample of the same client, so that image and text do not match."""
    others = [other for other in client if other.id != sample.id and "text" in other.content]
    return _with(sample, "text", others[rng.integers(len(others))].content["text"]) if others else sample


def _with(sample: Sample, modality: Modality, value: Content) -> Sample:
    return replace(sample, content={**sample.content, modality: value})


@dataclass(frozen=True)
class PartEntry:
    """A corruption in the index.

    Attributes:
        alter: the function.
        needs: modalities that a sample must hold. Other samples are not changed.
        summary: a one-line description.
        strength: the default strength.
        bounds: the smallest and largest strength, both inclusive.
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
            _picture("low_resolution"), ("image",), "few pixels; strength: factor by which sides shrink", 4, (1, 1000)
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
    """A configured corruption: its kind and strength, and the share of samples (or of clients) that it applies to."""

    kind: str
    share: float
    strength: float
    by_client: bool

    def __call__(self, client: str, samples: Sequence[Sample], seed: int) -> list[Sample]:
        """Return the client's samples, with those corrupted that are drawn, or all of them if the client is drawn."""
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
    """Parse a corruption such as ``"blur-0.3:4@client"``. The share defaults to 1, and the strength to that of the kind.

    Raises:
        ConfigError: if the kind is unknown or a number is out of range.
    """
    match = _SPEC.fullmatch(text)
    if match is None or match["kind"] not in PARTS:
        raise ConfigError(f"{text!r} is not a known corruption; known: {', '.join(PARTS)}, written KIND-SHARE[:STRENGTH][@client]")
    entry = PARTS[match["kind"]]
    try:
        share, strength = float(match["share"] or 1), float(match["strength"] or entry.strength)
    except ValueError:
        raise ConfigError(f"{text!r}: share and strength must be numbers, e.g. blur-0.3:4") from None
    low, high = entry.bounds
    if not 0 <= share <= 1 or not low <= strength <= high:
        raise ConfigError(f"{text!r}: the share must be in [0, 1] and the strength of {match['kind']} in [{low:g}, {high:g}]")
    return Part(match["kind"], share, strength, match["by"] is not None)
