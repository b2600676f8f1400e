"""What the nano model is pretrained on: short dialogues about a picture, a note, or both together.

The exercises teach reading, looking up and comparing, not the benchmark's tasks. None speaks of sources, misleading
messages, teams or parity, none asks for the larger digit or the next one, and picture-only, note-only and combined
contexts all occur, with varied instructions, so that differences between modality scenarios downstream stem from the
federation and not from a lopsided base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.types import Message, Part

Context = Literal["picture", "note", "both"]

TURNS = 4
"""Questions per dialogue: one context serves several, which teaches far more per second than one."""

_DIGITS = tuple(map(str, range(10)))
_PLACES = ("house", "park", "ship", "school", "market", "street", "bridge", "hotel", "farm", "station")
_THINGS = ("lamp", "cup", "book", "coat", "key", "rope", "box", "map", "bell", "chair")
_LABELS = ("Note: ", "Text: ", "Message: ", "", "It says: ")
_LEADS = ("", "Look at what is given. ", "Use all information given. ", "Answer based on what is given. ", "Answer whatever form it has. ")
_COMPARISONS = ("Is it true?", "Is the note right?", "Do they agree?", "Does it match the picture?")


@dataclass(frozen=True)
class Turn:
    """A question, its answer, the answers that could stand beside it as options, and the skill it exercises."""

    question: str
    answer: str
    rivals: tuple[str, ...]
    skill: str


@dataclass(frozen=True)
class Scene:
    """Two digits from left to right and their ink: the content of a picture or of a note."""

    digits: tuple[int, int]
    ink: str

    @property
    def number(self) -> str:
        """The digits as one word."""
        return f"{self.digits[0]}{self.digits[1]}"


@dataclass(frozen=True)
class Dialogue:
    """A chat about one context. User and assistant alternate; ``skills`` names what each answer exercises."""

    messages: tuple[Message, ...]
    skills: tuple[str, ...]


def dialogue(rng: np.random.Generator, split: Split = "pretrain", reading: bool = False) -> Dialogue:
    """Draw a dialogue about a picture (0.3), a note (0.2) or both (0.5), with the handwriting of a split.

    Args:
        rng: draws everything.
        split: whose handwriting.
        reading: the first lesson: pictures only, and only their digits are asked for.
    """
    context: Context = "picture" if reading else rng.choice(["picture", "note", "both"], p=[0.3, 0.2, 0.5])
    scene, note = _scene(rng), ""
    if context == "picture":
        turns = [_about(scene, kind, rng, "", "reading") for kind in _kinds(rng, reading)]
    elif context == "note":
        note, turns = _note_only(scene, rng)
    else:
        note, turns = _both(scene, rng)
    picture = None if context == "note" else sheet(scene.digits, scene.ink, split, rng)
    lead = "" if reading else _pick(rng, *_LEADS) + (_pick(rng, *_LABELS) + note if note else "")
    texts = [_asked(turn, rng, options=not reading) for turn in turns]
    return Dialogue(_messages(picture, lead, texts), tuple(turn.skill for turn in turns))


def _messages(picture: object, lead: str, texts: list[tuple[str, str]]) -> tuple[Message, ...]:
    messages = []
    for i, (question, answer) in enumerate(texts):
        text = "\n".join(line for line in (lead.strip() if i == 0 else "", question) if line)
        parts = [Part("text", text)]
        if i == 0 and picture is not None:
            parts.insert(0, Part("image", picture))  # type: ignore[arg-type]
        messages += [Message("user", tuple(parts)), Message("assistant", (Part("text", answer),))]
    return tuple(messages)


def _scene(rng: np.random.Generator) -> Scene:
    left, right = (int(digit) for digit in rng.integers(0, 10, size=2))
    return Scene((left, right), _pick(rng, *INKS))


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return str(choices[rng.integers(len(choices))])


def _kinds(rng: np.random.Generator, digits_only: bool = False) -> list[str]:
    """What to ask about a scene: different things, so that an answer is not just a copy of an earlier one."""
    if digits_only:
        return [str(kind) for kind in rng.permutation(["number", "left", "right"])]
    return [str(kind) for kind in rng.choice(["number", "left", "right", "ink", "present"], size=TURNS, replace=False)]


def _about(scene: Scene, kind: str, rng: np.random.Generator, where: str, skill: str) -> Turn:
    """A question of a kind about one scene."""
    if kind == "number":
        return Turn(_pick(rng, f"Which number is written{where}?", f"Read the digits{where}."), scene.number, _numbers(rng), skill)
    if kind == "ink":
        return Turn(_pick(rng, f"Which ink is used{where}?", f"What color is it{where}?"), scene.ink, tuple(INKS), skill)
    if kind == "present":
        digit = scene.digits[rng.integers(2)] if rng.random() < 0.5 else int(rng.integers(10))
        return Turn(f"Is there a {digit}{where}?", "yes" if digit in scene.digits else "no", ("yes", "no"), skill)
    digit = scene.digits[0 if kind == "left" else 1]
    return Turn(_pick(rng, f"Which digit is on the {kind}{where}?", f"{kind.title()} digit{where}?"), str(digit), _DIGITS, skill)


def _numbers(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(f"{number:02d}" for number in rng.integers(0, 100, size=4))


def _statement(scene: Scene, rng: np.random.Generator) -> str:
    """One statement about the scene, in words."""
    kind = rng.random()
    if kind < 0.55:
        return _pick(rng, f"the number is {scene.number}", f"it reads {scene.number}", f"{scene.number} is written", scene.number)
    if kind < 0.8:
        side = int(rng.integers(2))
        name, digit = ("left", "right")[side], scene.digits[side]
        return _pick(rng, f"the {name} digit is {digit}", f"{digit} is on the {name}")
    return _pick(rng, f"the ink is {scene.ink}", f"it is {scene.ink}")


def _altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """A scene in which both digits and the ink differ, so that any statement about it is false of the first."""
    left, right = ((digit + int(rng.integers(1, 10))) % 10 for digit in scene.digits)
    return Scene((left, right), _pick(rng, *(ink for ink in INKS if ink != scene.ink)))


def _description(scene: Scene, rng: np.random.Generator) -> str:
    """The whole scene in words."""
    left, right = scene.digits
    return _pick(rng, f"number {left}{right} in {scene.ink} ink", f"{left} on the left, {right} on the right, ink {scene.ink}")


def _note_only(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Turn]]:
    """A scene in words, or a story of a thing at a place."""
    if rng.random() < 0.6:
        return _description(scene, rng), [_about(scene, kind, rng, "", "lookup") for kind in _kinds(rng)]
    thing, place, ink = _pick(rng, *_THINGS), _pick(rng, *_PLACES), scene.ink
    story = _pick(
        rng, f"a {ink} {thing} near the {place}", f"at the {place} there is a {ink} {thing}", f"{thing} seen by the {place}, {ink}"
    )
    turns = [
        Turn("Which place is named?", place, _PLACES, "lookup"),
        Turn("Which thing is named?", thing, _THINGS, "lookup"),
        Turn("What color is it?", ink, tuple(INKS), "lookup"),
    ]
    return story, [turns[i] for i in rng.permutation(3)]


def _both(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Turn]]:
    """A picture with a note: three in four to be compared, else each to be asked about by name."""
    if rng.random() < 0.25:
        other = _scene(rng)
        asked = [(scene, " in the picture"), (other, " in the note")]
        picks = [(*asked[rng.integers(2)], kind) for kind in _kinds(rng)]
        return _description(other, rng), [_about(which, kind, rng, where, "both") for which, where, kind in picks]
    agree = rng.random() < 0.5
    note = _statement(scene if agree else _altered(scene, rng), rng)
    turns = [_about(scene, kind, rng, " in the picture", "both") for kind in _kinds(rng)[1:]]
    turns.insert(int(rng.integers(TURNS)), Turn(_pick(rng, *_COMPARISONS), "yes" if agree else "no", ("yes", "no"), "comparing"))
    return note, turns


def _asked(turn: Turn, rng: np.random.Generator, options: bool) -> tuple[str, str]:
    """Question and answer as written; one in four as multiple choice."""
    if not options or rng.random() < 0.75:
        return _pick(rng, "Question: ", "") + turn.question, turn.answer
    others = sorted({rival for rival in turn.rivals if rival != turn.answer})
    chosen = [str(rival) for rival in rng.permutation(others)[: int(rng.integers(1, 4))]]
    shown = [str(option) for option in rng.permutation([turn.answer, *chosen])]
    listed = " ".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(shown))
    return f"Question: {turn.question}\nOptions: {listed}\nAnswer with the letter.", chr(65 + shown.index(turn.answer))
