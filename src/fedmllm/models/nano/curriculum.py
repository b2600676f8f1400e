"""What the nano model is pretrained on: reading, looking up and comparing, in pictures, notes and both together.

The exercises teach skills, not the benchmark's tasks. None speaks of claims, sources, teams or parity, none asks for
the larger digit or the next one, and the picture-only, note-only and combined contexts all occur, so that
differences between modality scenarios downstream stem from the federation and not from a lopsided base model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.types import Message, Part

_PLACES = ("house", "park", "ship", "school", "market", "street", "church", "bridge", "hotel", "farm", "beach", "station")
_NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "John", "Kate", "Leo")
_THINGS = ("lamp", "cup", "book", "coat", "key", "rope", "box", "map", "bell", "chair", "clock", "knife")
_LABELS = ("Note: ", "Text: ", "Message: ", "Caption: ", "", "It says: ", "Report: ")
_LEADS = (
    "",
    "Look at what is given. ",
    "Use all information given. ",
    "Answer the question. ",
    "Read carefully. ",
    "Based on the information, answer. ",
    "Answer in whatever form the input comes. ",
)
_SINGLE = "Answer with the letter."
_COMPARISONS = ("Do the picture and the note agree?", "Is the note right?", "Does it match the picture?", "Same?")


@dataclass(frozen=True)
class Exercise:
    """A chat turn and the answer to it.

    Attributes:
        messages: the user's turn.
        answer: what to answer.
        skill: what it exercises, for reporting: the context, and for both together whether they are compared.
    """

    messages: tuple[Message, ...]
    answer: str
    skill: str


@dataclass(frozen=True)
class Scene:
    """Digits from left to right and their ink: the content of a picture or of a note."""

    digits: tuple[int, ...]
    ink: str

    @property
    def number(self) -> str:
        """The digits as one word."""
        return "".join(map(str, self.digits))


def exercise(rng: np.random.Generator, split: Split = "pretrain") -> Exercise:
    """Draw one exercise: picture only (0.3), note only (0.2) or both (0.5), with the handwriting of a split."""
    context = rng.choice(["picture", "note", "both"], p=[0.3, 0.2, 0.5])
    scene = _scene(rng)
    if context == "picture":
        note, (question, answer, rivals) = None, _about(scene, rng, "")
    elif context == "note":
        note, question, answer, rivals = _note_only(scene, rng)
    else:
        note, question, answer, rivals = _both(scene, rng)
    text, answer_text = _compose(rng, note, question, answer, rivals)
    parts = [Part("text", text)]
    if context != "note":
        parts.insert(0, Part("image", sheet(scene.digits, scene.ink, split, rng)))
    compares = context == "both" and answer in ("yes", "no") and question in _COMPARISONS
    return Exercise((Message("user", tuple(parts)),), answer_text, "comparing" if compares else str(context))


def reading(rng: np.random.Generator, split: Split = "pretrain") -> Exercise:
    """Draw the first lesson: read the digits of a picture, both or one."""
    digits = tuple(int(digit) for digit in rng.integers(0, 10, size=2))
    question, answer = (
        ("Which number is written?", f"{digits[0]}{digits[1]}"),
        ("Which digit is on the left?", str(digits[0])),
        ("Which digit is on the right?", str(digits[1])),
    )[rng.integers(3)]
    picture = sheet(digits, str(rng.choice(list(INKS))), split, rng)
    return Exercise((Message("user", (Part("image", picture), Part("text", question))),), answer, "reading")


def _scene(rng: np.random.Generator) -> Scene:
    count = 2 if rng.random() < 0.85 else 1
    return Scene(tuple(int(d) for d in rng.integers(0, 10, size=count)), str(rng.choice(list(INKS))))


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return str(choices[rng.integers(len(choices))])


def _about(scene: Scene, rng: np.random.Generator, where: str) -> tuple[str, str, tuple[str, ...]]:
    """A question about one scene, its answer and the answers that could stand beside it as options."""
    digits = tuple(map(str, range(10)))
    kind = rng.choice(["number", "side", "ink", "present", "place", "count"], p=[0.3, 0.36, 0.1, 0.1, 0.1, 0.04])
    if kind == "side" and len(scene.digits) == 2:
        side = int(rng.integers(2))
        name = ("left", "right")[side]
        question = _pick(rng, f"Which digit is on the {name}{where}?", f"Read the {name} one{where}.", f"{name.title()} digit{where}?")
        return question, str(scene.digits[side]), digits
    if kind == "ink":
        return _pick(rng, f"Which ink is used{where}?", f"What color is it{where}?", f"Ink{where}?"), scene.ink, tuple(INKS)
    if kind == "present":
        digit = int(rng.choice(scene.digits)) if rng.random() < 0.5 else int(rng.integers(10))
        question = _pick(rng, f"Is there a {digit}{where}?", f"Can you find a {digit}{where}?")
        return question, "yes" if digit in scene.digits else "no", ("yes", "no")
    if kind == "place" and len(set(scene.digits)) == 2:
        side = int(rng.integers(2))
        question = _pick(rng, f"On which side is the {scene.digits[side]}{where}?", f"Where is the {scene.digits[side]}{where}?")
        return question, ("left", "right")[side], ("left", "right")
    if kind == "count":
        return f"How many digits are there{where}?", str(len(scene.digits)), ("1", "2")
    question = _pick(rng, f"Which number is written{where}?", f"Read the digits{where}.", f"What does it show{where}?")
    others = tuple("".join(map(str, rng.integers(0, 10, size=len(scene.digits)))) for _ in range(5))
    return question, scene.number, others


def _note_text(scene: Scene, rng: np.random.Generator) -> str:
    """The whole scene in words."""
    if len(scene.digits) == 1:
        return _pick(rng, f"a {scene.number} in {scene.ink} ink", f"one digit, {scene.number}, {scene.ink}")
    left, right = scene.digits
    return _pick(
        rng,
        f"number {left}{right} in {scene.ink} ink",
        f"{left} on the left, {right} on the right, ink {scene.ink}",
        f"the left digit is {left} and the right digit is {right}, {scene.ink}",
        f"right {right}, left {left}, written in {scene.ink}",
    )


def _fragment(scene: Scene, rng: np.random.Generator) -> str:
    """One statement of the scene, in words."""
    kind = rng.integers(4)
    if kind == 0:
        return _pick(rng, f"the ink is {scene.ink}", f"in {scene.ink}")
    if kind == 1 or len(scene.digits) == 1:
        return _pick(rng, f"the number is {scene.number}", f"it reads {scene.number}", f"{scene.number}")
    side = int(rng.integers(2))
    name, digit = ("left", "right")[side], scene.digits[side]
    return _pick(
        rng, f"the {name} digit is {digit}", f"{digit} on the {name}", f"the {name} one reads {digit}", f"{digit} is on the {name} side"
    )


def _story(rng: np.random.Generator) -> tuple[str, str, str, tuple[str, ...]]:
    """A small story without digits: (story, question, answer, rivals)."""
    name, thing, place = _pick(rng, *_NAMES), _pick(rng, *_THINGS), _pick(rng, *_PLACES)
    color = _pick(rng, *INKS)
    story = _pick(
        rng,
        f"{name} left a {color} {thing} at the {place}.",
        f"There is a {color} {thing} near the {place}, says {name}.",
        f"At the {place}, {name} saw the {color} {thing}.",
        f"{name} went to the {place} with a {thing}; it was {color}.",
    )
    kind = rng.integers(4)
    question, answer, rivals = (
        ("Who is named?", name, _NAMES),
        ("Which place is named?", place, _PLACES),
        ("Which thing is named?", thing, _THINGS),
        ("What color is the thing?", color, tuple(INKS)),
    )[kind]
    return story, question, answer, rivals


def _note_only(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str, tuple[str, ...]]:
    if rng.random() < 0.5:
        return _story(rng)
    return (_note_text(scene, rng), *_about(scene, rng, ""))


def _both(scene: Scene, rng: np.random.Generator) -> tuple[str, str, str, tuple[str, ...]]:
    """A picture of ``scene`` with a note beside it: compare them, or ask about one of the two."""
    kind = rng.random()
    if kind < 0.7:
        agree = rng.random() < 0.5
        note = _fragment(scene if agree else _altered(scene, rng), rng)
        return note, _pick(rng, *_COMPARISONS), "yes" if agree else "no", ("yes", "no")
    if kind < 0.8:
        story, question, answer, rivals = _story(rng)
        if rng.random() < 0.5:
            question, answer, rivals = _about(scene, rng, "")
        return story, question, answer, rivals
    other = _scene(rng)
    if rng.random() < 0.5:
        return (_note_text(other, rng), *_about(scene, rng, " in the picture"))
    return (_note_text(other, rng), *_about(other, rng, " in the note"))


def _altered(scene: Scene, rng: np.random.Generator) -> Scene:
    """Another scene of the same length in which every digit and the ink differ, so that any statement of it is false."""
    digits = tuple((d + int(rng.integers(1, 10))) % 10 for d in scene.digits)
    inks = [ink for ink in INKS if ink != scene.ink]
    return Scene(digits, str(rng.choice(inks)))


def _compose(rng: np.random.Generator, note: str | None, question: str, answer: str, rivals: tuple[str, ...]) -> tuple[str, str]:
    """Text of the turn and the answer to give; three times in ten as multiple choice."""
    lines = [_pick(rng, *_LEADS)]
    if note is not None:
        lines[0] += _pick(rng, *_LABELS) + note
    lines.append(_pick(rng, "Question: ", "") + question)
    if rng.random() < 0.3:
        choices, answer = _choices(rng, answer, rivals)
        lines += [choices, _SINGLE]
    return "\n".join(line for line in lines if line), answer


def _choices(rng: np.random.Generator, answer: str, rivals: tuple[str, ...]) -> tuple[str, str]:
    """Options in random order under letters, and the letter of the right one."""
    others = sorted({rival for rival in rivals if rival != answer})
    others = list(rng.permutation(others)[: int(rng.integers(1, 4) if rng.random() < 0.8 else rng.integers(4, 8))])
    options = [str(option) for option in rng.permutation([answer, *others])]
    text = " ".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))
    return f"Options: {text}", chr(65 + options.index(answer))
