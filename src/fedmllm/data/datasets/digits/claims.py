"""digits-claims: is a message about an image of two digits misleading? Two classes, AUC; a counterpart of Hateful Memes.

The generative model, from which samples are drawn and the ceilings computed:

    misleading      y ~ Bernoulli(0.4)
    image           two digits, uniform; ink ~ P(ink | y), so the image alone is informative
    text            a source ~ P(source | y), so the text alone is informative; and a statement of the number, which is false
                    (both digits differ) with probability 0.95 if misleading, 0.05 if not, so both together say much more
"""

from __future__ import annotations

from itertools import product

import numpy as np

from fedmllm.data.datasets.digits.scans import INKS, Split, sheet
from fedmllm.types import Sample

QUESTION = "Is it misleading?"
OPTIONS = ("no", "yes")
P_MISLEADING = 0.4
P_FALSE = {False: 0.05, True: 0.95}
P_INK = {False: (0.375, 0.125, 0.375, 0.125), True: (0.125, 0.375, 0.125, 0.375)}
SOURCES = ("a nurse", "the manual", "a stranger", "some flyer")
P_SOURCE = {False: (0.375, 0.375, 0.125, 0.125), True: (0.125, 0.125, 0.375, 0.375)}
_WORDINGS = ("{source} says it reads {number}", "{number} is written, says {source}", "{source}: the number is {number}")


def generate(index: int, split: Split, rng: np.random.Generator) -> Sample:
    """Draw one sample from the generative model."""
    misleading = bool(rng.random() < P_MISLEADING)
    digits = tuple(int(d) for d in rng.integers(0, 10, size=2))
    ink = str(rng.choice(list(INKS), p=P_INK[misleading]))
    source = str(rng.choice(SOURCES, p=P_SOURCE[misleading]))
    false = rng.random() < P_FALSE[misleading]
    stated = [(digit + int(rng.integers(1, 10))) % 10 if false else digit for digit in digits]
    text = str(rng.choice(_WORDINGS)).format(source=source, number="".join(map(str, stated)))
    answer = OPTIONS[misleading]
    return Sample(
        id=f"claims-{split}-{index:06d}",
        question=QUESTION,
        answer=answer,
        options=OPTIONS,
        category=answer,
        content={"image": sheet(digits, ink, split, rng), "text": text},
    )


def ceilings() -> dict[str, float]:
    """Return the exact AUC of ranking by the likelihood ratio, which is optimal (Neyman-Pearson), for each source of evidence."""
    ink = {y: np.array(P_INK[y]) for y in (False, True)}
    source = {y: np.array(P_SOURCE[y]) for y in (False, True)}
    false = {y: np.array((1 - P_FALSE[y], P_FALSE[y])) for y in (False, True)}
    both = {y: np.array([a * b * c for a, b, c in product(ink[y], source[y], false[y])]) for y in (False, True)}
    return {"both": _auc(both[False], both[True]), "image": _auc(ink[False], ink[True]), "text": _auc(source[False], source[True])}


def _auc(honest: np.ndarray, misleading: np.ndarray) -> float:
    """Return P(ratio of a misleading draw > ratio of an honest one) + P(equal) / 2, by enumerating all outcomes."""
    ratio = np.round(misleading / honest, 12)
    wins = (ratio[:, None] > ratio[None, :]) + 0.5 * (ratio[:, None] == ratio[None, :])
    return float(misleading @ wins @ honest)
