"""Uses a trained adapter: ``fedmllm evaluate``, ``fedmllm chat`` and ``fedmllm merge``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.data.datasets import Dataset
from fedmllm.data.federated import load
from fedmllm.data.images import open_image
from fedmllm.errors import DataError
from fedmllm.evaluation.evaluate import evaluate, predict
from fedmllm.evaluation.metrics import require_scorable
from fedmllm.files import require_new_folder, write_atomically
from fedmllm.models.load import VisionLanguageModel, choose_device, load_model
from fedmllm.models.processors import needs_torchvision
from fedmllm.models.saved import load_adapter, save_merged
from fedmllm.run.adapters import find_adapter
from fedmllm.run.card import merged_card
from fedmllm.run.encodable import usable
from fedmllm.training.batches import Encoder
from fedmllm.types import Metrics, Modality, Prediction, Sample

CONTENTS: tuple[Modality, ...] = ("image", "text")
"""The modalities of the content that a question can refer to."""
_TRAINED = ("algorithm={}", "lora.client_ranks=[]")
"""Overrides that drop the method. The adapter does not depend on it, and a method from a user's script may not be imported here."""


def score_adapter(
    path: Path, experiment_file: Path | None = None, overrides: Sequence[str] = (), force: bool = False
) -> tuple[str, Metrics]:
    """Score an adapter on its experiment's test split.

    Args:
        path: a run folder, or a PEFT adapter folder.
        experiment_file: names model and data; by default the run's own ``config.yaml``.
        overrides: settings as ``key.path=value``, e.g. the data's current location.
        force: accept the model even if it is not the run's.

    Returns:
        (name of the headline metric, all metrics).

    Raises:
        RunError: if no experiment file is given or found.
        ModelError: if the model is not the run's, or the adapter does not fit it.
    """
    experiment, adapter = _found(path, experiment_file, overrides, force)
    dataset = _tested(experiment)
    return dataset.metric, Adapter(experiment, _loaded(experiment, adapter)).score(dataset)


@dataclass(frozen=True)
class Adapter:
    """A trained adapter on its model.

    Attributes:
        experiment: the experiment that trained the adapter. Its wording and its evaluation settings apply.
        vlm: the model with the adapter.
    """

    experiment: Experiment
    vlm: VisionLanguageModel

    def evaluate(self) -> Metrics:
        """Return all metrics on the experiment's test split; the headline is ``score``."""
        return self.score(_tested(self.experiment))

    def score(self, dataset: Dataset) -> Metrics:
        """Return all metrics on a dataset's test split."""
        encoder, settings = Encoder(self.vlm, self.experiment.data.wording), self.experiment
        asked = usable(dataset.test, encoder, settings.data.on_bad_sample)
        return evaluate(self.vlm, asked, encoder, dataset.metric, settings.evaluation, settings.seed)

    def predict(self, questions: Sequence[Mapping[str, Any]]) -> list[Prediction]:
        """Return an answer to each question, worded as in training.

        Args:
            questions: mappings with the key ``question``, the keys ``image`` (a path or a PIL image) and ``text`` for its content, and the key
                ``options`` if it is multiple choice.

        Raises:
            DataError: if a question has another key or no text, or an image cannot be read.
        """
        encoder = Encoder(self.vlm, self.experiment.data.wording, max_bytes=0)
        return predict(self.vlm, [_sample(i, row) for i, row in enumerate(questions)], encoder, self.experiment.evaluation)


def load_adapter_of(path: Path, experiment_file: Path | None = None, overrides: Sequence[str] = (), force: bool = False) -> Adapter:
    """Load a trained adapter and its model. Arguments and errors are those of ``score_adapter``."""
    experiment, adapter = _found(path, experiment_file, overrides, force)
    return Adapter(experiment, _loaded(experiment, adapter))


def _sample(number: int, row: Mapping[str, Any]) -> Sample:
    """Return a question as a sample. A placeholder stands for the correct answer, which a sample must have."""
    if unknown := sorted(row.keys() - {"question", "options", *CONTENTS}):
        raise DataError(f"question {number}: {unknown[0]!r} is not a known key; use question, image, text and options")
    if not isinstance(row.get("question"), str):
        raise DataError(f"question {number}: question must be the text to ask, got {row.get('question')!r}")
    options = tuple(row.get("options", ()))
    held = {name: _content(name, row[name]) for name in CONTENTS if row.get(name) is not None}
    return Sample(
        f"question {number}", row["question"], options[0] if options else "?", held, options, answer_type="choice" if options else "open"
    )


def _content(name: str, value: Any) -> Any:
    return open_image(Path(value)) if name == "image" and isinstance(value, (str, Path)) else value


def chat(
    path: Path,
    experiment_file: Path | None = None,
    content: Mapping[Modality, Any] | None = None,
    options: Sequence[str] = (),
    force: bool = False,
) -> Callable[[str], Prediction]:
    """Return a function that answers a question with the trained model, in the wording of training.

    Args:
        path: a run folder, or a PEFT adapter folder.
        experiment_file: names model and prompt; by default the run's own ``config.yaml``.
        content: content that all questions refer to, by modality: an image's path, a text.
        options: the answers to choose from; empty for free answers.
        force: accept the model even if it is not the run's.

    Raises:
        RunError: if no experiment file is given or found.
        ModelError: if the model is not the run's, or the adapter does not fit it.
        DataError: if the image cannot be read.
    """
    adapter = load_adapter_of(path, experiment_file, (), force)
    held = {name: _content(name, value) for name, value in (content or {}).items()}
    return lambda question: adapter.predict([{"question": question, "options": options, **held}])[0]


def merge(path: Path, output: Path, experiment_file: Path | None = None, overrides: Sequence[str] = (), force: bool = False) -> float:
    """Write the model with the adapter merged into its weights, as a Transformers folder. A model quantized to 4 bits is written in bfloat16.

    Args:
        path: a run folder, or a PEFT adapter folder.
        output: the folder to write; it must not exist.
        experiment_file: names the model; by default the run's own ``config.yaml``.
        overrides: settings as ``key.path=value``, e.g. ``model.name`` for the model's current location.
        force: accept the model even if it is not the run's.

    Returns:
        The share of the adapter's change that is lost to the number format; see ``save_merged``.

    Raises:
        RunError: if no experiment file is given or found, or if ``output`` exists or cannot be created.
        ModelError: if the model is not the run's, or the adapter does not fit it.
    """
    require_new_folder(output)
    experiment, adapter = _found(path, experiment_file, overrides, force)
    whole = experiment.model.model_copy(update={"quantization": "none"})
    vlm = _loaded(experiment.model_copy(update={"model": whole}), adapter)
    lost = save_merged(vlm, output)
    write_atomically(output / "README.md", merged_card(experiment.model.name, needs_torchvision(vlm.processor)).encode())
    return lost


def _found(path: Path, experiment_file: Path | None, overrides: Sequence[str], force: bool) -> tuple[Experiment, Path]:
    """Return the experiment and the adapter folder. Unless forced, the experiment expects the run's own model."""
    adapter, chosen, own = find_adapter(path, experiment_file)
    experiment = Experiment.load(chosen, [*_TRAINED, *overrides])
    began = None if own is None else Experiment.load(own, _TRAINED).model.fingerprint
    return experiment.with_fingerprint(None if force else experiment.model.fingerprint or began), adapter


def _tested(experiment: Experiment) -> Dataset:
    """Return an experiment's dataset, whose test split can be scored."""
    dataset = load(experiment.data, experiment.seed)
    require_scorable(dataset.metric, dataset.test, "the test split")
    return dataset


def _loaded(experiment: Experiment, adapter: Path) -> VisionLanguageModel:
    return load_adapter(load_model(experiment.model, choose_device(experiment.engine.device)), adapter)
