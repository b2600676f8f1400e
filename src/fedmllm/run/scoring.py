"""Uses a trained adapter: ``fedmllm evaluate``, ``fedmllm chat`` and ``fedmllm merge``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmllm.config import Experiment
from fedmllm.data.federated import load
from fedmllm.data.images import open_image
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
    data = experiment.data
    dataset = load(data, experiment.seed)
    require_scorable(dataset.metric, dataset.test, "the test split")
    vlm = _loaded(experiment, adapter)
    encoder = Encoder(vlm, data.wording)
    samples = usable(dataset.test, encoder, data.on_bad_sample)
    return dataset.metric, evaluate(vlm, samples, encoder, dataset.metric, experiment.evaluation, experiment.seed)


def chat(
    path: Path,
    experiment_file: Path | None = None,
    content: Mapping[Modality, Any] | None = None,
    options: Sequence[str] = (),
    force: bool = False,
) -> Callable[[str], Prediction]:
    """Return a function from a question to the trained model's answer. Questions use the wording of training.

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
    experiment, adapter = _found(path, experiment_file, (), force)
    held = {name: open_image(value) if name == "image" else value for name, value in (content or {}).items()}
    vlm = _loaded(experiment, adapter)
    encode, config = Encoder(vlm, experiment.data.wording, max_bytes=0), experiment.evaluation

    def ask(question: str) -> Prediction:
        answer = options[0] if options else "?"
        sample = Sample("chat", question, answer, held, tuple(options), answer_type="choice" if options else "open")
        return predict(vlm, [sample], encode, config)[0]

    return ask


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


def _loaded(experiment: Experiment, adapter: Path) -> VisionLanguageModel:
    return load_adapter(load_model(experiment.model, choose_device(experiment.engine.device)), adapter)
