"""The contract of every dataset.

A new dataset adds one row: to ``ROOTS`` (None if it is embedded, else a folder of real files) or, where its files may not
be redistributed, a writer of its layout to ``written.WRITERS``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from contracts.written import WRITERS
from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS, Dataset, DatasetRequest, load_dataset
from fedmllm.data.federated import federate, manifest
from fedmllm.data.images import open_image
from fedmllm.data.prompts import target, to_messages
from fedmllm.evaluation.metrics import majority_score, score
from fedmllm.types import Prediction, Sample

ROOTS: dict[str, str | None] = {
    "digits-claims": None,
    "digits-triage": None,
    "digits-vqa": None,
    "digits-cards": None,
    "vqa_rad": "vqa_rad",
    "nlvr": "nlvr",
    "emojitwo": "emojitwo",
}


def root_of(name: str) -> Path | None:
    folder = ROOTS[name]
    if folder is None:
        return None
    if "FEDMLLM_DATA" not in os.environ:
        pytest.skip("FEDMLLM_DATA names no folder of real datasets")
    return Path(os.environ["FEDMLLM_DATA"]).resolve() / folder


@pytest.fixture(params=sorted({*ROOTS, *WRITERS}))
def request_(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, DatasetRequest]:
    if request.param in ROOTS:
        return request.param, DatasetRequest(root_of(request.param), 0, num_train=100, num_test=60)
    root, options = WRITERS[request.param](tmp_path)
    return request.param, DatasetRequest(root, 0, num_train=100, num_test=60, options=options)


@pytest.fixture
def dataset(request_: tuple[str, DatasetRequest]) -> Dataset:
    return load_dataset(*request_)


def test_every_dataset_has_a_row() -> None:
    assert {*ROOTS, *WRITERS} == set(DATASETS) - {"mixture"}  # a mixture has its own tests
    for name, entry in DATASETS.items():
        assert entry.needs_root == (name in WRITERS or ROOTS.get(name) is not None)


def test_loading_twice_gives_the_same(dataset: Dataset, request_: tuple[str, DatasetRequest]) -> None:
    again = load_dataset(*request_)
    for split in ("train", "validation", "test"):
        assert [described(s) for s in getattr(dataset, split)] == [described(s) for s in getattr(again, split)]


def test_the_validation_part_and_test_split_ignore_the_training_size(dataset: Dataset, request_: tuple[str, DatasetRequest]) -> None:
    assert 10 <= len(dataset.validation) <= len(dataset.test)
    fewer = load_dataset(request_[0], replace(request_[1], num_train=20))
    assert [s.id for s in fewer.validation] == [s.id for s in dataset.validation]
    assert [s.id for s in fewer.test] == [s.id for s in dataset.test]
    assert len(load_dataset(request_[0], replace(request_[1], num_validation=10)).validation) == 10


def described(sample: Sample) -> tuple[object, ...]:
    return sample.id, sample.question, sample.answer, sample.category, sample.content.get("text")


def test_samples_are_complete(dataset: Dataset) -> None:
    assert (len(dataset.train), len(dataset.test)) == (100, 60)
    for sample in dataset.samples:
        assert sample.modalities == tuple(sorted(dataset.modalities))
        assert sample.question.strip()
        assert sample.answer.strip()
        assert sample.category
        assert (sample.answer in sample.options) == (sample.answer_type == "choice")
        assert target(sample)
        assert to_messages(sample, "agnostic") != to_messages(sample, "specific")


def test_pictures_decode(dataset: Dataset) -> None:
    for sample in dataset.test[:5]:
        if "image" in sample.content:
            assert open_image(sample.content["image"]).mode == "RGB"  # type: ignore[arg-type]


def test_the_metric_fits(dataset: Dataset) -> None:
    """Right answers score 1; the majority answer scores less."""
    right = [Prediction(s, s.answer, tuple(float(option == s.answer) for option in s.options)) for s in dataset.test]
    assert score(dataset.metric, right) == 1.0
    assert majority_score(dataset.metric, dataset.train, dataset.test) < 0.8


def test_ceilings_are_scores(dataset: Dataset) -> None:
    assert set(dataset.ceilings) in (set(), {"both", "image", "text"})
    assert all(0 < value <= 1 for value in dataset.ceilings.values())


def test_it_federates(request_: tuple[str, DatasetRequest]) -> None:
    name, request = request_
    data = {"dataset": name, "root": request.root, "num_train": 100, "num_test": 60, "options": dict(request.options)}
    experiment = Experiment.parse({"data": data, "federation": {"num_clients": 4, "scenario": "missing-0.3"}})
    split = federate(experiment.data, experiment.federation, 0)
    record = manifest(split, "missing-0.3", 0)
    assert sum(client["num_samples"] for client in record["clients"]) + record["dropped"] == 100
