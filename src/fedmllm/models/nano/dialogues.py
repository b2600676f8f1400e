"""The last pretraining stage: dialogues in varied words about a picture, a note, or both.

They teach reading, looking up and comparing, but not the benchmark's tasks: none mentions sources, misleading messages,
teams or parity, and none asks for the larger digit or the next one. Picture-only, note-only and combined contexts all occur
with varied instructions, so that differences between modality scenarios come from the federation and not from an
unbalanced base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.models.nano.scenes import DIGITS, PLACES, THINGS, Dialogue, Scene, altered, chat, description, draw_scene, pick

Context = Literal["picture", "note", "both"]

TURNS = 4
"""Questions per dialogue. Several questions about one context teach far more per second of computing than one."""

_LABELS = ("Note: ", "Text: ", "Message: ", "", "It says: ")
_LEADS = ("", "Look at what is given. ", "Use all information given. ", "Answer based on what is given. ", "Answer whatever form it has. ")
_AGREE = ("Is it true?", "Is the note right?", "Do they agree?", "Does it match the picture?")
_DISAGREE = ("Is it wrong?", "Is there a mistake?", "Do they differ?", "Is the note false?")
_MOST_OPTIONS = 8


@dataclass(frozen=True)
class Turn:
    """A question, its answer, wrong answers that can be options, and the skill that it exercises."""

    question: str
    answer: str
    rivals: tuple[str, ...]
    skill: str


def dialogue(rng: np.random.Generator, split: Split = "pretrain") -> Dialogue:
    """Draw a dialogue about a picture (0.3), a note (0.2) or both (0.5), with the handwriting of a split."""
    context: Context = rng.choice(["picture", "note", "both"], p=[0.3, 0.2, 0.5])
    scene, note = draw_scene(rng), ""
    if context == "picture":
        turns = [_about(scene, kind, rng, "", "reading") for kind in _kinds(rng)]
    elif context == "note":
        note, turns = _note_only(scene, rng)
    else:
        note, turns = _both(scene, rng)
    picture = None if context == "note" else sheet(scene.digits, scene.ink, split, rng)
    lead = pick(rng, *_LEADS) + (pick(rng, *_LABELS) + note if note else "")
    return chat(picture, lead.strip(), [_asked(turn, rng) for turn in turns], [turn.skill for turn in turns])


def _kinds(rng: np.random.Generator) -> list[str]:
    """Draw different kinds of questions about a scene, so that no answer is a copy of an earlier one."""
    return [str(kind) for kind in rng.choice(["number", "left", "right", "ink", "present"], size=TURNS, replace=False)]


def _about(scene: Scene, kind: str, rng: np.random.Generator, where: str, skill: str) -> Turn:
    """Return a question of one kind about a scene."""
    if kind == "number":
        return Turn(pick(rng, f"Which number is written{where}?", f"Read the digits{where}."), scene.number, _numbers(rng), skill)
    if kind == "ink":
        return Turn(pick(rng, f"Which ink is used{where}?", f"What color is it{where}?"), scene.ink, tuple(INKS), skill)
    if kind == "present":
        digit = scene.digits[rng.integers(2)] if rng.random() < 0.5 else int(rng.integers(10))
        return Turn(f"Is there a {digit}{where}?", "yes" if digit in scene.digits else "no", ("yes", "no"), skill)
    return Turn(pick(rng, f"Which digit is on the {kind}{where}?", f"{kind.title()} digit{where}?"), scene.fact(kind), DIGITS, skill)


def _numbers(rng: np.random.Generator) -> tuple[str, ...]:
    return tuple(f"{number:02d}" for number in rng.integers(0, 100, size=_MOST_OPTIONS))


def _statement(scene: Scene, rng: np.random.Generator) -> str:
    """Return one statement about the scene in words."""
    kind = rng.random()
    if kind < 0.55:
        return pick(rng, f"the number is {scene.number}", f"it reads {scene.number}", f"{scene.number} is written", scene.number)
    if kind < 0.8:
        side = pick(rng, "left", "right")
        return pick(rng, f"the {side} digit is {scene.fact(side)}", f"{scene.fact(side)} is on the {side}")
    return pick(rng, f"the ink is {scene.ink}", f"it is {scene.ink}")


def _note_only(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Turn]]:
    """Draw a note that describes a scene, or a story of a thing at a place, and the questions about it."""
    if rng.random() < 0.6:
        return description(scene, rng), [_about(scene, kind, rng, "", "lookup") for kind in _kinds(rng)]
    thing, place, ink = pick(rng, *THINGS), pick(rng, *PLACES), scene.ink
    story = pick(
        rng, f"a {ink} {thing} near the {place}", f"at the {place} there is a {ink} {thing}", f"{thing} seen by the {place}, {ink}"
    )
    turns = [
        Turn("Which place is named?", place, PLACES, "lookup"),
        Turn("Which thing is named?", thing, THINGS, "lookup"),
        Turn("What color is it?", ink, tuple(INKS), "lookup"),
    ]
    return story, [turns[i] for i in rng.permutation(3)]


def _both(scene: Scene, rng: np.random.Generator) -> tuple[str, list[Turn]]:
    """Draw a note to go with a picture, and the questions.

    In three of four cases they are compared, in half of these with the first question. Otherwise questions name the picture or the note.
    """
    if rng.random() < 0.25:
        other = draw_scene(rng)
        asked = [(scene, " in the picture"), (other, " in the note")]
        picks = [(*asked[rng.integers(2)], kind) for kind in _kinds(rng)]
        return description(other, rng), [_about(which, kind, rng, where, "both") for which, where, kind in picks]
    agree = rng.random() < 0.5
    note = _statement(scene if agree else altered(scene, rng), rng)
    turns = [_about(scene, kind, rng, " in the picture", "both") for kind in _kinds(rng)[1:]]
    place = 0 if rng.random() < 0.5 else int(rng.integers(TURNS))
    turns.insert(place, _comparison(agree, rng))
    return note, turns


def _comparison(agree: bool, rng: np.random.Generator) -> Turn:
    """Ask for agreement or for disagreement equally often, so that yes does not come to mean agreement."""
    asked_to_agree = rng.random() < 0.5
    question = pick(rng, *(_AGREE if asked_to_agree else _DISAGREE))
    return Turn(question, "yes" if agree == asked_to_agree else "no", ("yes", "no"), "comparing")


def _asked(turn: Turn, rng: np.random.Generator) -> tuple[str, str]:
    """Return the texts of question and answer. One in three questions is multiple choice."""
    if rng.random() < 2 / 3:
        return pick(rng, "Question: ", "") + turn.question, turn.answer
    others = sorted({rival for rival in turn.rivals if rival != turn.answer})
    chosen = [str(rival) for rival in rng.permutation(others)[: int(rng.integers(1, _MOST_OPTIONS))]]
    shown = [str(option) for option in rng.permutation([turn.answer, *chosen])]
    listed = " ".join(f"{chr(65 + i)}. {option}" for i, option in enumerate(shown))
    return f"Question: {turn.question}\nOptions: {listed}\nAnswer with the letter.", chr(65 + shown.index(turn.answer))
