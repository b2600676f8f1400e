from __future__ import annotations

from collections import Counter

import pytest

from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS
from fedmllm.data.federated import FederatedData, client_id, federate, manifest
from fedmllm.errors import ConfigError, DataError


def make(**federation: object) -> FederatedData:
    experiment = Experiment.parse({"data": {"num_train": 80, "num_test": 10}, "federation": {"min_partition_size": 4, **federation}})
    return federate(experiment.data, experiment.federation, experiment.seed)


def test_clients_share_out_the_training_samples() -> None:
    data = make(num_clients=7)
    ids = [sample.id for samples in data.clients.values() for sample in samples]
    assert sorted(ids) == sorted(sample.id for sample in data.dataset.train)


def test_the_manifest_counts_what_clients_hold() -> None:
    data = make(num_clients=5, scenario="missing-0.4")
    record = manifest(data, "missing-0.4", 0)
    assert sum(client["num_samples"] for client in record["clients"]) + record["dropped"] == 80
    for client in record["clients"]:
        samples = data.clients[client["id"]]
        assert client["labels"] == dict(Counter(sample.category for sample in samples))
        assert sum(client["modalities"].values()) == len(samples) == client["num_samples"]
    assert record["test"]["modalities"] == {"image+text": 10}


def test_the_test_split_stays_complete() -> None:
    assert all(sample.modalities == ("image", "text") for sample in make(scenario="missing-0.5").dataset.test)


def test_more_clients_than_samples() -> None:
    with pytest.raises(DataError, match=r"federation\.num_clients: 30 clients of at least 4 samples need 120"):
        make(num_clients=30)


def test_a_client_left_without_samples_is_named() -> None:
    with pytest.raises(DataError, match=r"client-\d\d: 0 of \d+ samples left") as caught:
        make(num_clients=40, min_partition_size=1, scenario="missing-0.9")
    assert "milder scenario" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ({"dataset": "vqa_rad"}, "data.root: vqa_rad reads files"),
        ({"dataset": "vqa_rad", "root": "no/such/folder"}, "is not a folder"),
        ({"dataset": "digits-vqa", "root": "."}, "is embedded in the package"),
    ],
)
def test_roots_that_do_not_fit(data: dict[str, object], part: str) -> None:
    experiment = Experiment.parse({"data": data})
    with pytest.raises(ConfigError, match=part):
        federate(experiment.data, experiment.federation, 0)


def test_ids_sort_like_numbers() -> None:
    assert client_id(7, 10) == "client-07"
    names = [client_id(i, 1001) for i in range(1001)]
    assert names == sorted(names)
    assert names[0] == "client-0000"


def test_the_index_of_datasets_has_a_file_each() -> None:
    from pathlib import Path

    import fedmllm.data.datasets as package

    folder = Path(package.__file__).parent
    files = {path.stem for path in folder.iterdir() if not path.name.startswith("_")} - {"base"}
    assert {name.split("-")[0] for name in DATASETS} == files
