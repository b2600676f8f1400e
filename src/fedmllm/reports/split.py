"""Shows a split before training: ``fedmllm data list``, ``show`` and ``export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fedmllm.data.datasets import DATASETS
from fedmllm.data.export import export
from fedmllm.data.federated import FederatedData, federate, manifest
from fedmllm.data.prompts import WORDINGS, Wording, target, to_messages
from fedmllm.data.quality import PARTS
from fedmllm.data.scenarios import SCENARIOS, SETTINGS
from fedmllm.errors import ConfigError
from fedmllm.files import require_new_folder
from fedmllm.run.results import versions
from fedmllm.types import Record, Sample

if TYPE_CHECKING:
    from fedmllm.config import Experiment


def catalog() -> dict[str, dict[str, str]]:
    """Return a one-line summary of every dataset, scenario, benchmark setting and further kind of heterogeneity."""
    return {
        "datasets": {name: entry.summary for name, entry in DATASETS.items()},
        "scenarios": {name: row.summary for name, row in SCENARIOS.items()},
        "settings": {name: f"{SCENARIOS[kind].summary}: {level}" for name in SETTINGS for kind, _, level in [name.partition("-")]},
        "heterogeneity": {name: row.summary for name, row in PARTS.items()},
    }


def describe(experiment: Experiment) -> Record:
    """Return a split as JSON: its manifest without the samples, and one example in every wording."""
    data = federate(experiment.data, experiment.federation, experiment.seed)
    record = _manifest(data, experiment)
    holders = (*record["clients"], record["validation"], record["test"])
    *clients, validation, test = ({key: value for key, value in held.items() if key != "samples"} for held in holders)
    first = next(iter(data.clients.values()))[0]
    shown = example(first, {**WORDINGS, **experiment.data.wordings})
    return {**record, "clients": clients, "validation": validation, "test": test, "example": shown}


def example(sample: Sample, wordings: Mapping[str, Wording]) -> Record:
    """Return a sample as stored, and its prompt in each wording."""
    content = {name: value if isinstance(value, (str, Path)) else type(value).__name__ for name, value in sample.content.items()}
    return {
        "id": sample.id,
        "content": {name: str(value) for name, value in content.items()},
        "question": sample.question,
        "options": list(sample.options),
        "answer": sample.answer,
        "wordings": {name: _worded(sample, wording) for name, wording in wordings.items()},
        "target": target(sample),
    }


def _worded(sample: Sample, wording: Wording) -> str:
    parts = to_messages(sample, wording)[0].parts
    return "".join(str(part.value) if part.type == "text" else f"<{part.type}>" for part in parts)


def export_split(experiment: Experiment, folder: Path) -> Path:
    """Write the split as files; see ``data.export``."""
    require_new_folder(folder)
    data = federate(experiment.data, experiment.federation, experiment.seed)
    record = _manifest(data, experiment) | {"versions": versions()}
    return export(data, folder, record, experiment.model_dump(mode="json", exclude_none=True))


def save_picture(record: Record, path: Path) -> None:
    """Draw stacked bars of each client's samples by label and by modalities. The file's extension sets the format, e.g. PNG.

    Raises:
        ConfigError: if the extension is not an image format, or the folder does not exist.
    """
    from fedmllm.reports.drawing import write_picture
    from fedmllm.reports.figures import client_samples
    from fedmllm.run.reader import Client

    try:
        write_picture(path, client_samples, [Client.model_validate(client) for client in record["clients"]])
    except (OSError, ValueError) as error:
        raise ConfigError(f"--picture {path}: cannot be written ({error}); name a file such as clients.png") from error


def _manifest(data: FederatedData, experiment: Experiment) -> Record:
    return manifest(data, experiment.federation.scenario, experiment.seed)
