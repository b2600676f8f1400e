from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from fedmllm.config import Experiment
from fedmllm.data.datasets import DATASETS, Dataset
from fedmllm.data.federated import FederatedData, client_id, decodable, federate, manifest, spread
from fedmllm.errors import ConfigError, DataError
from fedmllm.types import EditedImage, Holding, Sample


def make(**federation: object) -> FederatedData:
    experiment = Experiment.parse({"data": {"num_train": 80, "num_test": 10}, "federation": {"min_partition_size": 4, **federation}})
    return federate(experiment.data, experiment.federation, experiment.seed)


def test_clients_hold_each_training_sample_once() -> None:
    data = make(num_clients=7)
    ids = [sample.id for samples in data.clients.values() for sample in samples]
    assert sorted(ids) == sorted(sample.id for sample in data.dataset.train)


def test_the_manifest_counts_clients_samples() -> None:
    data = make(num_clients=5, scenario="missing-0.4")
    record = manifest(data, "missing-0.4", 0)
    assert sum(client["num_samples"] for client in record["clients"]) + record["dropped"] == 80
    for client in record["clients"]:
        samples = data.clients[client["id"]]
        assert client["labels"] == dict(Counter(sample.category for sample in samples))
        assert sum(client["modalities"].values()) == len(samples) == client["num_samples"]
    assert record["test"]["modalities"] == {"image+text": 10}


def test_samples_that_a_scenario_drops_are_counted() -> None:
    """Samples that lose all modalities, and samples whose natural client cannot hold them."""
    assert make(num_clients=5, scenario="missing-0.4").dropped > 0
    samples = [Sample(f"s{i}", "q", "a", {"image": b""} if i % 2 else {"text": "t"}, client=f"c{i % 4 // 2}") for i in range(40)]
    dataset = Dataset("own", "accuracy", tuple(samples[:-2]), tuple(samples[-2:]), ("image", "text"))
    federation = Experiment.parse(
        {"federation": {"scenario": "cross-5:5", "partition": "natural", "num_clients": 2, "clients_per_round": 1}}
    )
    data = spread(dataset, federation.federation, 0)
    assert data.dropped == 19
    assert manifest(data, "cross-5:5", 0)["dropped"] == 19


def test_the_manifest_names_clients_that_withhold_their_counts() -> None:
    """Withheld counts are null, not replaced by a number."""
    data = make(num_clients=2)
    reported = {"a": Holding(None), "b": Holding(7, {"text": 7})}
    record = manifest(FederatedData(data.dataset, {"a": (), "b": ()}, 0, reported), "aligned", 0)
    assert [client["num_samples"] for client in record["clients"]] == [None, 7]
    assert record["notes"] == [
        *data.dataset.notes,
        "1 client(s) do not report their number of samples and have weight 1 in averages by sample counts: a",
    ]
    assert manifest(data, "aligned", 0)["notes"] == list(data.dataset.notes)


def test_the_test_split_stays_complete() -> None:
    assert all(sample.modalities == ("image", "text") for sample in make(scenario="missing-0.5").dataset.test)


def test_more_clients_than_samples_are_refused() -> None:
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
def test_a_missing_or_needless_root_is_refused(data: dict[str, object], part: str) -> None:
    experiment = Experiment.parse({"data": data})
    with pytest.raises(ConfigError, match=part):
        federate(experiment.data, experiment.federation, 0)


def test_ids_sort_like_numbers() -> None:
    assert client_id(7, 10) == "client-07"
    names = [client_id(i, 1001) for i in range(1001)]
    assert names == sorted(names)
    assert names[0] == "client-0000"


def test_every_dataset_has_a_file() -> None:
    from pathlib import Path

    import fedmllm.data.datasets as package

    folder = Path(package.__file__).parent
    files = {path.stem for path in folder.iterdir() if not path.name.startswith("_")} - {"base", "columns", "files", "rows", "tables"}
    assert {"own" if name in ("jsonl", "csv", "huggingface") else name.split("-")[0] for name in DATASETS} == files


def test_corruptions_and_keep_empty_apply_to_clients_samples() -> None:
    data = make(num_clients=4, scenario="missing-0.6", heterogeneity=["truncation-1:1", "noise-0.5"], keep_empty=True)
    samples = [sample for held in data.clients.values() for sample in held]
    assert len(samples) == 80
    clients = manifest(data, "missing-0.6", 0)["clients"]
    assert sum(client["modalities"].get("none", 0) for client in clients) == sum(not sample.content for sample in samples) > 0
    assert data.dropped == 0
    assert all(" " not in str(sample.content["text"]) for sample in samples if "text" in sample.content)
    noisy = [isinstance(sample.content["image"], EditedImage) for sample in samples if "image" in sample.content]
    assert 0.2 < sum(noisy) / len(noisy) < 0.8
    assert all(sample.modalities == ("image", "text") for sample in data.dataset.test)


def test_the_reference_protocol_has_its_own_split() -> None:
    ours, theirs = make(num_clients=4), make(num_clients=4, protocol="reference")
    assert sorted(len(held) for held in ours.clients.values()) != sorted(len(held) for held in theirs.clients.values())
    again = make(num_clients=4, protocol="reference", min_partition_size=1)
    assert [len(held) for held in again.clients.values()] == [len(held) for held in theirs.clients.values()]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"heterogeneity": ["fog"]}, "'fog' is not a known corruption"),
        ({"protocol": "reference", "partition": "iid"}, "the reference code supports only partition dirichlet"),
        ({"partition": "natural", "dirichlet_alpha": 1.0}, "natural has no skew to set"),
        ({"partition": "natural"}, "80 of 80 samples have none"),
    ],
)
def test_contradictory_settings_are_refused(settings: dict[str, object], rule: str) -> None:
    with pytest.raises((ConfigError, DataError), match=rule):
        make(num_clients=4, **settings)


OWN = {"train": "t.jsonl", "columns": {"image": "i", "answer": "a", "client": "c"}, "question": "Which?", "choices": ["x", "y"]}


def own_data(root: Path) -> Experiment:
    """Twenty pictures of two sites, one truncated and one not a picture."""
    rows = [{"i": f"{k}.png", "a": "xy"[k % 2], "c": f"site-{k % 2}"} for k in range(20)]
    for row in rows:
        Image.new("RGB", (9, 9), "red").save(root / row["i"])
    (root / "3.png").write_bytes((root / "3.png").read_bytes()[:40])
    (root / "4.png").write_text("no picture")
    (root / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset": "jsonl", "root": root, "options": OWN}
    return Experiment.parse({"data": data, "federation": {"num_clients": 2, "partition": "natural", "min_partition_size": 2}})


def test_broken_pictures_are_all_named_or_skipped(tmp_path: Path) -> None:
    experiment = own_data(tmp_path)
    with pytest.raises(DataError, match=r"2 image\(s\) cannot be used") as caught:
        federate(experiment.data, experiment.federation, 0)
    assert "3.png" in str(caught.value)
    assert "4.png" in str(caught.value)
    data = federate(experiment.data.model_copy(update={"on_bad_sample": "skip"}), experiment.federation, 0)
    assert len(data.dataset.train) + len(data.dataset.test) == 18
    assert any("2 sample(s) skipped for 2 image(s)" in note for note in data.dataset.notes)


def test_natural_clients_keep_their_names(tmp_path: Path) -> None:
    experiment = own_data(tmp_path)
    data = federate(experiment.data.model_copy(update={"on_bad_sample": "skip"}), experiment.federation, 0)
    assert list(data.clients) == ["site-0", "site-1"]
    assert all(sample.client == name for name, held in data.clients.items() for sample in held)


def test_natural_clients_with_invalid_file_names_are_numbered(tmp_path: Path) -> None:
    experiment = own_data(tmp_path)
    rows = (tmp_path / "t.jsonl").read_text()
    (tmp_path / "t.jsonl").write_text(rows.replace("site-", "../site "))
    data = federate(experiment.data.model_copy(update={"on_bad_sample": "skip"}), experiment.federation, 0)
    assert list(data.clients) == ["client-00", "client-01"]
    assert {sample.client for sample in data.clients["client-00"]} == {"../site 0"}


def test_pictures_in_memory_are_checked_too() -> None:
    """The rows of a Hugging Face dataset hold pictures in memory."""
    samples = [Sample(f"s{i}", "q", "a", {"image": b"no picture" if i == 1 else b"", "text": "t"}) for i in range(3)]
    dataset = Dataset("own", "accuracy", tuple(samples[:2]), tuple(samples[2:]), ("image", "text"))
    with pytest.raises(DataError, match=r"3 image\(s\) cannot be used") as caught:
        decodable(dataset, "refuse")
    assert "s1: 10 bytes: cannot be decoded as an image" in str(caught.value)


def test_settings_of_the_dataset_are_checked_with_the_experiment() -> None:
    with pytest.raises(ConfigError, match=r"data\.options\.langauge"):
        Experiment.parse({"data": {"dataset": "slake", "root": "x", "options": {"langauge": "en"}}})
