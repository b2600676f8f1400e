"""The subject of pretraining: two digits in one ink, shown in a picture or described in a note."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from fedmllm.data.datasets.digits.scans import INKS
from fedmllm.types import Message, Part

DIGITS = tuple(map(str, range(10)))
PLACES = ("house", "park", "ship", "school", "market", "street", "bridge", "hotel", "farm", "station")
THINGS = ("lamp", "cup", "book", "coat", "key", "rope", "box", "map", "bell", "chair")


@dataclass(frozen=True)
class Scene:
    """Two digits from left to right and their ink: the content of a picture or of a note."""

    digits: tuple[int, int]
    ink: str

    @property
    def number(self) -> str:
        """The digits as one word."""
        return f"{self.digits[0]}{self.digits[1]}"

    def fact(self, kind: str) -> str:
        """Return the scene's ``number``, ``left`` digit, ``right`` digit or ``ink`` as one word."""
        return {"number": self.number, "left": str(self.digits[0]), "right": str(self.digits[1]), "ink": self.ink}[kind]


@dataclass(frozen=True)
class Dialogue:
    """A chat about one context. User and assistant alternate; ``skills`` names what each answer exercises."""

    messages: tuple[Message, ...]
    skills: tuple[str, ...]


def pick(rng: np.random.Generator, *choices: str) -> str:
    """Choose one of the choices uniformly."""
    return str(choices[rng.integers(len(choices))])


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw digits and ink uniformly."""
    left, right = (int(digit) for digit in rng.integers(0, 10, size=2))
    return Scene((left, right), pick(rng, *INKS))


def altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """Draw a scene with other digits and another ink, so that every statement about it is false for the given scene."""
    left, right = ((digit + int(rng.integers(1, 10))) % 10 for digit in scene.digits)
    return Scene((left, right), pick(rng, *(ink for ink in INKS if ink != scene.ink)))


def description(scene: Scene, rng: np.random.Generator) -> str:
    """Describe the whole scene in words."""
    left, right = scene.digits
    return pick(
        rng,
        f"number {left}{right} in {scene.ink} ink",
        f"{left} on the left, {right} on the right, ink {scene.ink}",
        f"{left}{right} {scene.ink}",
    )


@cache
def english() -> str:
    """Return real English text: the descriptions of scikit-learn's datasets."""
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    return "\n".join(getattr(datasets, f"load_{name}")().DESCR for name in names)


@cache
def english_words() -> tuple[str, ...]:
    """Return the distinct lowercase words of ``english``, sorted."""
    return tuple(sorted(set(re.findall(r"\b[a-z]{3,}\b", english()))))


def chat(picture: Image.Image | None, lead: str, turns: Sequence[tuple[str, str]], skills: Sequence[str]) -> Dialogue:
    """Return questions and answers as messages, with picture and lead before the first question."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        text = "\n".join(line for line in (lead if i == 0 else "", question) if line)
        parts = [Part("text", text)] if text else []
        if i == 0 and picture is not None:
            parts.insert(0, Part("image", picture))
        messages += [Message("user", tuple(parts)), Message("assistant", (Part("text", answer),))]
    return Dialogue(tuple(messages), tuple(skills))
