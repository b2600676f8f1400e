"""The embedded data are reproducible, follow the distribution in each task's docstring, and have valid ceilings.

The distributions are written a second time here, from the docstrings, so that code and numbers check each other. A small
classifier reads the pictures' content back from their pixels and knows nothing of how samples are drawn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score
from sklearn.svm import SVC

from fedmllm.data.datasets import load_dataset
from fedmllm.data.datasets.base import Dataset, DatasetRequest
from fedmllm.data.datasets.digits.scans import scans_by_digit, sheet
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import Sample

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TASKS = ("digits-claims", "digits-triage", "digits-vqa", "digits-cards")
DRAWS = 200_000
"""Samples of a simulation: a share has an error of 0.001, an AUC or a macro-F1 of 0.002."""

INKS = {"black": (25, 25, 25), "red": (200, 30, 30), "blue": (30, 50, 200), "green": (20, 130, 40)}


def generate(name: str, num_train: int, num_test: int = 1, seed: int = 7) -> Dataset:
    return load_dataset(name, DatasetRequest(None, seed, num_train, num_test))


@pytest.fixture(scope="module")
def claims() -> Dataset:
    return generate("digits-claims", 900, 10)


@pytest.fixture(scope="module")
def triage() -> Dataset:
    return generate("digits-triage", 900, 10)


@pytest.fixture(scope="module")
def vqa() -> Dataset:
    return generate("digits-vqa", 500, 10)


@pytest.fixture(scope="module")
def cards() -> Dataset:
    return generate("digits-cards", 3000, 10)


@pytest.fixture(params=["claims", "triage", "vqa", "cards"])
def dataset(request: pytest.FixtureRequest) -> Dataset:
    """Each of the four datasets."""
    made: Dataset = request.getfixturevalue(request.param)
    return made


# Reading the pictures.


def picture(sample: Sample) -> Image.Image:
    image = sample.content["image"]
    assert isinstance(image, Image.Image)
    return image


def halves(page: Image.Image) -> list[Floats]:
    """The left and the right digit, as centered 18x16 arrays of darkness."""
    darkness = np.asarray(page.convert("L"), dtype=np.float64)
    darkness = np.clip(np.median(darkness) - darkness, 0, None)
    return [_centered(darkness[12:52, side : side + 32]) for side in (0, 32)]


def _centered(crop: Floats) -> Floats:
    rows, columns = np.indices(crop.shape)
    mass = crop.sum()
    shift = round(20 - (crop * rows).sum() / mass), round(16 - (crop * columns).sum() / mass)
    centered = np.roll(crop / crop.max(), shift, axis=(0, 1))[2:38]
    return np.asarray(centered.reshape(18, 2, 16, 2).mean(axis=(1, 3)).ravel())


@pytest.fixture(scope="module")
def read() -> Callable[[Sequence[Sample]], Ints]:
    """The two digits of each sample's picture, shape (samples, 2), read by a classifier that is trained on training scans."""
    rng = np.random.default_rng(0)
    digits = rng.integers(0, 10, size=(500, 2))
    inputs = [half for pair in digits for half in halves(sheet((int(pair[0]), int(pair[1])), "black", "train", rng))]
    classifier = SVC(C=10).fit(inputs, digits.ravel())

    def digits_of(samples: Sequence[Sample]) -> Ints:
        crops = [half for sample in samples for half in halves(picture(sample))]
        return np.asarray(classifier.predict(crops)).reshape(-1, 2)

    return digits_of


def ink_of(sample: Sample) -> str:
    """The ink whose color the darkest pixels have."""
    pixels = np.asarray(picture(sample), dtype=np.float64).reshape(-1, 3)
    darkest = pixels[np.argsort(pixels.sum(axis=1))[:20]].mean(axis=0)
    return min(INKS, key=lambda name: float(np.abs(darkest - INKS[name]).sum()))


def assert_share(hits: Sequence[bool] | NDArray[np.bool_], expected: float) -> None:
    """Within four standard errors. A correct share fails for one seed in 16,000."""
    margin = 4 * np.sqrt(expected * (1 - expected) / len(hits))
    assert abs(np.mean(hits) - expected) <= margin, f"{np.mean(hits):.3f} is not {expected} +- {margin:.3f}"


# Reproducible.


def described(sample: Sample) -> tuple[object, ...]:
    """Everything in a sample, with pictures as bytes."""
    content = {
        name: (part.mode, part.size, part.tobytes()) if isinstance(part, Image.Image) else part for name, part in sample.content.items()
    }
    return sample.id, sample.question, sample.answer, content, sample.options, sample.category, sample.answer_type


def test_a_sample_depends_on_seed_split_and_index_alone(dataset: Dataset) -> None:
    again, other = generate(dataset.name, 3, 15), generate(dataset.name, 5, 5, seed=8)

    assert [described(s) for s in again.train] == [described(s) for s in dataset.train[:3]]
    assert [described(s) for s in again.test[:10]] == [described(s) for s in dataset.test]
    assert [described(s)[1:] for s in dataset.train[:5]] != [described(s)[1:] for s in other.train]
    assert [described(s)[1:] for s in dataset.train[:5]] != [described(s)[1:] for s in dataset.test[:5]]


def test_default_sizes() -> None:
    dataset = load_dataset("digits-cards", DatasetRequest(None, seed=0))

    assert (len(dataset.train), len(dataset.test)) == (1600, 400)


@pytest.mark.parametrize(("train", "test", "empty"), [(0, 1, "train"), (1, 0, "test")])
def test_an_empty_split_is_refused(train: int, test: int, empty: str) -> None:
    with pytest.raises(DataError, match=f"the {empty} split is empty"):
        generate("digits-cards", train, test)


@pytest.mark.parametrize("name", TASKS)
def test_a_folder_is_refused(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match=r"data\.root"):
        load_dataset(name, DatasetRequest(tmp_path_factory.mktemp("root"), seed=0))


SHAPES = {
    "digits-claims": ("auc", ("image", "text"), ("no", "yes")),
    "digits-triage": ("macro_f1", ("image", "text"), ("boats", "pumps", "tents", "trucks", "cranes", "medics", "drones", "guards")),
    "digits-vqa": ("accuracy", ("image",), ()),
    "digits-cards": ("accuracy", ("text",), ()),
}


def test_samples_have_the_tasks_modalities_and_options(dataset: Dataset) -> None:
    metric, modalities, options = SHAPES[dataset.name]

    assert (dataset.metric, dataset.modalities) == (metric, modalities)
    assert set(dataset.ceilings) == {"both", "image", "text"}
    for sample in (*dataset.train, *dataset.test):
        assert (sample.modalities, sample.options) == (modalities, options)
        assert not options or sample.category == sample.answer == options[sample.label]


# Scans and sheets.


def test_each_scan_is_in_exactly_one_split_under_its_digit() -> None:
    pixels, digits = load_digits(return_X_y=True)
    scans = Counter((int(d), np.round(p * (255 / 16)).astype(np.uint8).tobytes()) for p, d in zip(pixels, digits, strict=True))
    splits = {
        split: [(d, scan.tobytes()) for d in range(10) for scan in scans_by_digit(split)[d]] for split in ("pretrain", "train", "test")
    }

    assert sum(map(Counter, splits.values()), Counter()) == scans
    for one, other in combinations(splits.values(), 2):
        assert not {scan for _, scan in one} & {scan for _, scan in other}
    assert all(len(scans_by_digit(split)[d]) >= 30 for split in ("pretrain", "train", "test") for d in range(10))


@pytest.mark.parametrize("ink", INKS)
def test_a_sheet_is_light_paper_with_digits_in_the_ink_asked_for(ink: str) -> None:
    page = sheet((3, 8), ink, "test", np.random.default_rng(0))
    sample = Sample("x", "?", "!", {"image": page})

    assert (page.mode, page.size) == ("RGB", (64, 64))
    assert np.asarray(page)[[0, 0, -1, -1], [0, -1, 0, -1]].min() >= 225
    assert ink_of(sample) == ink


# digits-claims.

P_MISLEADING = 0.4
P_INK = np.array([[0.375, 0.125, 0.375, 0.125], [0.125, 0.375, 0.125, 0.375]])  # honest, misleading; inks black, red, blue, green
P_SOURCE = np.array([[0.375, 0.375, 0.125, 0.125], [0.125, 0.125, 0.375, 0.375]])  # a nurse, the manual, a stranger, some flyer
P_FALSE = np.array([[0.95, 0.05], [0.05, 0.95]])  # a true, a false statement
SOURCES = ("a nurse", "the manual", "a stranger", "some flyer")
EVIDENCE = {"image": (P_INK,), "text": (P_SOURCE,), "both": (P_INK, P_SOURCE, P_FALSE)}


def test_claims_follow_their_distribution(claims: Dataset, read: Callable[[Sequence[Sample]], Ints]) -> None:
    texts = [str(sample.content["text"]) for sample in claims.train]
    misleading = np.array([sample.answer == "yes" for sample in claims.train])
    inks, digits = np.array([ink_of(sample) for sample in claims.train]), read(claims.train)
    sources = np.array([next(name for name in SOURCES if name in text) for text in texts])
    assert all(len(re.findall(r"\d", text)) == 2 for text in texts)
    stated = np.array([[int(digit) for digit in re.findall(r"\d", text)] for text in texts])
    false = (stated != digits).any(axis=1)
    assert_share(misleading, P_MISLEADING)
    for y in (0, 1):
        of_class = misleading == y
        assert_share(false[of_class], P_FALSE[y, 1])
        for i, ink in enumerate(INKS):
            assert_share((inks == ink)[of_class], P_INK[y, i])
        for i, source in enumerate(SOURCES):
            assert_share((sources == source)[of_class], P_SOURCE[y, i])
    for d in range(10):
        assert_share((digits == d).ravel(), 0.1)
        assert_share((stated == d).ravel(), 0.1)


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_claims_ceiling_is_the_auc_of_the_posterior(evidence: str, claims: Dataset) -> None:
    rng = np.random.default_rng(1)
    misleading = (rng.random(DRAWS) < P_MISLEADING).astype(int)
    joint = np.stack([(1 - P_MISLEADING) * np.ones(DRAWS), P_MISLEADING * np.ones(DRAWS)])
    for table in EVIDENCE[evidence]:
        observed = (rng.random(DRAWS)[:, None] > table.cumsum(axis=1)[misleading][:, :-1]).sum(axis=1)
        joint *= table[:, observed]
    posterior = np.round(joint[1] / joint.sum(axis=0), 12)  # rounded, as equal evidence in another order is a tie

    assert roc_auc_score(misleading, posterior) == pytest.approx(claims.ceilings[evidence], abs=0.005)


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_no_ranking_of_claims_beats_the_ceiling(evidence: str, claims: Dataset) -> None:
    cells = np.ones((2, 1))
    for table in EVIDENCE[evidence]:
        cells = (cells[:, :, None] * table[:, None, :]).reshape(2, -1)
    labels, weights = np.repeat([0, 1], cells.shape[1]), cells.ravel()
    best = np.round(np.log(cells[1] / cells[0]), 9)
    rng = np.random.default_rng(2)
    rankings = [rng.normal(size=best.size) for _ in range(60)] + [best + rng.normal(0, 0.3, size=best.size) for _ in range(60)]

    def auc(ranking: Floats) -> float:
        return float(roc_auc_score(labels, np.tile(ranking, 2), sample_weight=weights))

    assert auc(best) == pytest.approx(claims.ceilings[evidence], abs=1e-9)
    assert max(map(auc, rankings)) <= claims.ceilings[evidence] + 1e-9


def test_a_claim_needs_both_modalities(claims: Dataset) -> None:
    assert 0.6 < max(claims.ceilings["image"], claims.ceilings["text"]) < claims.ceilings["both"] - 0.2 < 0.8


# digits-triage.

PRIOR = np.array([0.26, 0.18, 0.15, 0.12, 0.10, 0.08, 0.06, 0.05])
TEAM = np.arange(8)
P_ZONE = 0.92 * (TEAM[:, None] // 2 == np.arange(4)) + 0.08 / 4
P_EVENT = 0.90 * (TEAM[:, None] % 4 == np.arange(4)) + 0.10 / 4
CELLS = {"image": P_ZONE, "text": P_EVENT, "both": (P_ZONE[:, :, None] * P_EVENT[:, None, :]).reshape(8, 16)}
EVENT_WORDS = ("flood water river rain", "fire smoke flames burning", "crowd people families children", "wires wall roof glass")


def test_triage_follows_its_distribution(triage: Dataset, read: Callable[[Sequence[Sample]], Ints]) -> None:
    teams = np.array([sample.label for sample in triage.train])
    words = [set(re.findall(r"\w+", str(sample.content["text"]))) for sample in triage.train]
    events = [[i for i, row in enumerate(EVENT_WORDS) if found & set(row.split())] for found in words]
    left = read(triage.train)[:, 0]

    for team in range(8):
        assert_share(teams == team, PRIOR[team])
    assert all(len(found) == 1 for found in events)
    assert left.max() <= 7
    assert_share(np.ravel(events) == teams % 4, 0.925)  # 0.9, and a quarter of the random events
    assert_share(left // 2 == teams // 2, 0.94)  # 0.92, and a quarter of the random zones
    assert_share(left % 2 == 0, 0.5)


def macro_f1(evidence: str, rule: Ints) -> float:
    """A rule's macro-F1 for infinitely many samples: scikit-learn's score of one sample per team and cell, weighted by its share."""
    cells = CELLS[evidence]
    truth, weights = np.repeat(TEAM, cells.shape[1]), (PRIOR[:, None] * cells).ravel()
    return float(f1_score(truth, np.tile(rule, 8), sample_weight=weights, labels=TEAM, average="macro", zero_division=0))


def bayes_rule(evidence: str) -> Ints:
    """The most probable team of each cell."""
    return np.asarray((PRIOR[:, None] * CELLS[evidence]).argmax(axis=0))


def one_cell_changes(rule: Ints) -> list[Ints]:
    changed = [np.where(np.arange(rule.size) == cell, team, rule) for cell in range(rule.size) for team in range(8)]
    return [candidate for candidate in changed if (candidate != rule).any()]


@pytest.mark.parametrize("evidence", CELLS)
def test_triage_ceiling_is_close_to_the_macro_f1_of_the_posterior(evidence: str, triage: Dataset) -> None:
    rng = np.random.default_rng(3)
    teams = rng.choice(8, size=DRAWS, p=PRIOR)
    cells = (rng.random(DRAWS)[:, None] > CELLS[evidence].cumsum(axis=1)[teams][:, :-1]).sum(axis=1)

    score = f1_score(teams, bayes_rule(evidence)[cells], average="macro", zero_division=0)
    assert score == pytest.approx(triage.ceilings[evidence], abs=0.01)


def local_optimum(evidence: str, rule: Ints) -> Ints:
    """A rule that no change of one cell improves."""
    better = max(one_cell_changes(rule), key=lambda candidate: macro_f1(evidence, candidate))
    return local_optimum(evidence, better) if macro_f1(evidence, better) > macro_f1(evidence, rule) else rule


@pytest.mark.parametrize("evidence", CELLS)
def test_no_rule_of_triage_beats_the_ceiling(evidence: str, triage: Dataset) -> None:
    ceiling, best = triage.ceilings[evidence], local_optimum(evidence, bayes_rule(evidence))
    rng = np.random.default_rng(4)
    near = [np.where(rng.random(best.size) < 0.2, rng.integers(0, 8, size=best.size), best) for _ in range(80)]

    assert macro_f1(evidence, best) == pytest.approx(ceiling, abs=1e-9)
    assert max(macro_f1(evidence, rule) for rule in (*near, *rng.integers(0, 8, size=(40, best.size)))) <= ceiling + 1e-9


def test_triage_needs_both_modalities(triage: Dataset) -> None:
    assert 0.25 < max(triage.ceilings["image"], triage.ceilings["text"]) < triage.ceilings["both"] - 0.4


# digits-vqa and digits-cards.


def answer(question: str, a: int, b: int) -> str:
    """The answer to a question about the left or first digit ``a`` and the right or second digit ``b``."""
    if "larger digit" in question or "is larger," in question:
        return str(a if a > b else b)
    if "smaller" in question:
        return str(b if a > b else a)
    if "comes next" in question:
        return "0" if b == 9 else str(b + 1)
    truth = {"larger than": a > b, "odd": a in (1, 3, 5, 7, 9), "below six": a in range(6) and b in range(6)}
    (value,) = (held for words, held in truth.items() if words in question)
    return "yes" if value else "no"


def test_vqa_answers_are_right_for_the_digits_in_pictures(vqa: Dataset, read: Callable[[Sequence[Sample]], Ints]) -> None:
    right = [sample.answer == answer(sample.question, *map(int, pair)) for sample, pair in zip(vqa.train, read(vqa.train), strict=True)]

    assert np.mean(right) >= 0.995  # the reader may mistake a digit


def test_card_answers_are_right_for_the_digits_in_texts(cards: Dataset) -> None:
    for sample in (*cards.train, *cards.test):
        card = str(sample.content["text"])
        digits = [int(d) for d in re.findall(r"\d", card)]
        a, b = digits if len(digits) == 2 else digits * 2
        assert sample.answer == answer(card, a, b), card


@pytest.mark.parametrize("name", ["vqa", "cards"])
def test_kinds_are_equally_frequent_and_half_are_open(name: str, request: pytest.FixtureRequest) -> None:
    samples = request.getfixturevalue(name).train
    kinds = np.array([sample.category for sample in samples])

    assert len(set(kinds)) == 6
    for kind in set(kinds):
        assert_share(kinds == kind, 1 / 6)
        assert {sample.answer_type for sample in samples if sample.category == kind} == {
            "open" if kind in {"larger", "smaller", "next"} else "closed"
        }
    assert all((sample.answer in {"yes", "no"}) == (sample.answer_type == "closed") for sample in samples)


QUESTIONS = ("larger digit", "smaller", "comes next", "larger than", "odd", "below six")


def accuracy_of_guessing(known: Callable[[Ints], Ints]) -> float:
    """The simulated accuracy of the most frequent answer, given what is known of (question, a, b), learned from other draws."""
    answers = sorted({"yes", "no", *map(str, range(10))})
    table = np.array([[[answers.index(answer(q, a, b)) for b in range(10)] for a in range(10)] for q in QUESTIONS])
    draws = np.random.default_rng(5).integers(0, [6, 10, 10], size=(DRAWS, 3))
    truth, given, half = table[tuple(draws.T)], known(draws), DRAWS // 2
    counts = np.zeros((600, len(answers)), dtype=np.int64)
    np.add.at(counts, (given[:half], truth[:half]), 1)
    return float(accuracy_score(truth[half:], counts.argmax(axis=1)[given[half:]]))


def test_vqa_ceilings_are_the_accuracies_of_the_best_guesses(vqa: Dataset) -> None:
    assert accuracy_of_guessing(lambda draws: draws[:, 0]) == pytest.approx(vqa.ceilings["text"], abs=0.01)
    assert accuracy_of_guessing(lambda draws: 10 * draws[:, 1] + draws[:, 2]) == pytest.approx(vqa.ceilings["image"], abs=0.01)
    assert accuracy_of_guessing(lambda draws: draws @ np.array([100, 10, 1])) == vqa.ceilings["both"] == 1.0
    assert max(vqa.ceilings["text"], vqa.ceilings["image"]) < 0.5


def test_cards_ceilings_are_the_accuracies_of_the_best_guesses(cards: Dataset) -> None:
    assert accuracy_of_guessing(lambda draws: 0 * draws[:, 0]) == pytest.approx(cards.ceilings["image"], abs=0.01)
    assert cards.ceilings["text"] == cards.ceilings["both"] == 1.0
    assert cards.ceilings["image"] < 0.5
