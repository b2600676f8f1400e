"""The first lessons: short exercises with many answers per second of computing.

A model that starts with whole dialogues spends most of its time on a plateau: it cannot compare before it can read, and
yes-or-no answers teach little about reading. Drills train the skills separately.
"""

from __future__ import annotations

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.models.nano.scenes import DIGITS, PLACES, THINGS, Dialogue, Scene, altered, chat, description, draw_scene, english_words, pick

CHECKS = 6
"""Yes-or-no questions per drill."""

_KINDS = ("number", "left", "right", "ink")


def caption(rng: np.random.Generator, split: Split) -> Dialogue:
    """Draw a picture; the answer is everything it shows: ``35 red``."""
    scene = draw_scene(rng)
    return chat(sheet(scene.digits, scene.ink, split, rng), "", [("", f"{scene.number} {scene.ink}")], ["caption"])


def short_questions(rng: np.random.Generator, split: Split) -> Dialogue:
    """Draw a picture or, one time in four, a note, with questions that have one-word answers: ``left?  3  ink?  red``."""
    scene = draw_scene(rng)
    turns = [(f"{kind}?", scene.fact(kind)) for kind in map(str, rng.permutation(_KINDS))]
    if rng.random() < 0.25:
        return chat(None, description(scene, rng), turns, ["short question"] * len(turns))
    return chat(sheet(scene.digits, scene.ink, split, rng), "", turns, ["short question"] * len(turns))


def picture_checks(rng: np.random.Generator, split: Split) -> Dialogue:
    """Draw a picture and statements about it, each right or wrong: ``47?  no  left 3?  yes``."""
    scene = draw_scene(rng)
    turns = [_check(scene, rng) for _ in range(CHECKS)]
    return chat(sheet(scene.digits, scene.ink, split, rng), "", turns, ["picture check"] * CHECKS)


def note_checks(rng: np.random.Generator, split: Split) -> Dialogue:
    """Draw statements about a scene in words, or about whether words occur in a list. There is no picture, so ``split`` is not used."""
    if rng.random() < 0.5:
        scene = draw_scene(rng)
        note, turns = description(scene, rng), [_check(scene, rng) for _ in range(CHECKS)]
    else:
        note, turns = _word_list(rng)
    return chat(None, note, turns, ["note check"] * CHECKS)


def _check(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    kind, right = pick(rng, *_KINDS), rng.random() < 0.5
    fact = (scene if right else altered(scene, rng)).fact(kind)
    return (f"{kind} {fact}?" if kind in ("left", "right") else f"{fact}?"), _yes(right)


def _word_list(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]]]:
    """Draw two to five words, and questions whether words are among them."""
    pool = (*DIGITS, *PLACES, *THINGS, *INKS) if rng.random() < 0.7 else english_words()
    words = [str(word) for word in rng.choice(pool, size=int(rng.integers(2, 6)) + 3, replace=False)]
    present, absent = words[3:], words[:3]
    rights = rng.random(CHECKS) < 0.5
    return " ".join(present), [(pick(rng, *(present if right else absent)) + "?", _yes(bool(right))) for right in rights]


def _yes(right: bool) -> str:
    return "yes" if right else "no"
