"""digits-vqa: open and closed questions about an image of two digits; a counterpart of VQA-RAD and SLAKE.
digits-cards: the same knowledge in text-only questions; a counterpart of the medical flashcards.

Questions about an image cannot be answered without it; the question alone only narrows down the answers. Digits are drawn uniformly, so
the ceilings without the image, or without the question, follow from enumerating the 100 pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.types import Sample

Rule = Callable[[int, int], str]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


OPEN: dict[str, tuple[str, Rule]] = {
    "larger": ("Which is the larger digit?", lambda left, right: str(max(left, right))),
    "smaller": ("Which is the smaller digit?", lambda left, right: str(min(left, right))),
    "next": ("Which digit comes next after the right one?", lambda left, right: str((right + 1) % 10)),
}
CLOSED: dict[str, tuple[str, Rule]] = {
    "left-larger": ("Is the left digit larger than the right one?", lambda left, right: _yes(left > right)),
    "odd": ("Is the left digit odd?", lambda left, right: _yes(left % 2 == 1)),
    "small": ("Are both digits below six?", lambda left, right: _yes(max(left, right) < 6)),
}
CARDS: dict[str, tuple[str, Rule]] = {
    "larger": ("Which is larger, {a} or {b}?", lambda a, b: str(max(a, b))),
    "smaller": ("Which is smaller, {a} or {b}?", lambda a, b: str(min(a, b))),
    "next": ("Which digit comes next after {b}?", lambda a, b: str((b + 1) % 10)),
    "left-larger": ("Is {a} larger than {b}?", lambda a, b: _yes(a > b)),
    "odd": ("Is {a} odd?", lambda a, b: _yes(a % 2 == 1)),
    "small": ("Are {a} and {b} below six?", lambda a, b: _yes(max(a, b) < 6)),
}


def generate_vqa(index: int, split: Split, rng: np.random.Generator) -> Sample:
    """Draw an image and a question about it."""
    kind = str(rng.choice([*OPEN, *CLOSED]))
    left, right = (int(d) for d in rng.integers(0, 10, size=2))
    question, rule = (OPEN | CLOSED)[kind]
    picture = sheet((left, right), str(rng.choice(list(INKS))), split, rng)
    return Sample(
        id=f"vqa-{split}-{index:06d}",
        question=question,
        answer=rule(left, right),
        category=kind,
        answer_type="open" if kind in OPEN else "closed",
        content={"image": picture},
    )


def generate_card(index: int, split: Split, rng: np.random.Generator) -> Sample:
    """Draw a text-only question. The card itself is the content, so that a scenario can remove it."""
    kind = str(rng.choice(list(CARDS)))
    a, b = (int(d) for d in rng.integers(0, 10, size=2))
    card, rule = CARDS[kind]
    return Sample(
        id=f"cards-{split}-{index:06d}",
        question="Answer the card.",
        answer=rule(a, b),
        category=kind,
        answer_type="open" if kind in OPEN else "closed",
        content={"text": card.format(a=a, b=b)},
    )


def vqa_ceilings() -> dict[str, float]:
    """Return the best accuracy: 1 with image and question, and without one of them the share of the most frequent answer."""
    rules = [rule for _, rule in (OPEN | CLOSED).values()]
    pairs = list(product(range(10), repeat=2))
    text = np.mean([_top_share(rule(*pair) for pair in pairs) for rule in rules])
    image = np.mean([_top_share(rule(*pair) for rule in rules) for pair in pairs])
    return {"both": 1.0, "image": float(image), "text": float(text)}


def card_ceilings() -> dict[str, float]:
    """Return the best accuracy: 1 with the card, and without it the share of the most frequent answer."""
    answers = _top_share(rule(*pair) for _, rule in CARDS.values() for pair in product(range(10), repeat=2))
    return {"both": 1.0, "image": answers, "text": 1.0}


def _top_share(answers: Iterable[str]) -> float:
    counts = Counter(answers)
    return max(counts.values()) / counts.total()
