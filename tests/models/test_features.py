"""Vision features stored in place of pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.data.test_copies import reduced_copy
from fedmllm.errors import ModelError
from fedmllm.models.encoding import Encoded, answer_logits, collate
from fedmllm.models.features import VisionFeatures
from fedmllm.models.load import VisionLanguageModel
from fedmllm.training.batches import Encoder


@pytest.fixture
def vlm(nano: VisionLanguageModel) -> VisionLanguageModel:
    """The embedded model, whose name appears in the errors."""
    return nano


@pytest.fixture
def keeping(vlm: VisionLanguageModel) -> VisionLanguageModel:
    return replace(vlm, features=VisionFeatures(vlm, 1 << 24))


@pytest.fixture
def samples(encoder: Encoder, federation: FederatedData) -> list[Encoded]:
    return [encoder(sample) for sample in federation.dataset.test[:6]]


def count_calls(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each pass of the vision tower."""
    tower, calls = vlm.model.get_base_model().model.vision_tower, []
    forward = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(tower, "forward", counted)
    return calls


def test_a_model_that_ignores_features_is_refused(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of an older Transformers accepts any argument, and would train without the pictures."""
    decoder = vlm.model.get_base_model()
    monkeypatch.setattr(type(decoder), "forward", lambda self, input_ids=None, pixel_values=None, **kwargs: None)
    with pytest.raises(ModelError, match=r"'nano' does not accept image features instead of images; set engine\.feature_bytes to 0"):
        VisionFeatures(vlm, 1 << 20)


def test_each_picture_is_encoded_once(keeping: VisionLanguageModel, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(keeping, monkeypatch)
    for order in (samples, samples[::-1], samples[2:4]):
        answer_logits(keeping, collate(keeping, order))
    assert len(calls) == len({sample.picture for sample in samples}) == 6


def test_stored_features_give_the_same_result_bit_for_bit(keeping: VisionLanguageModel, samples: list[Encoded]) -> None:
    """Therefore a resumed run, whose store is empty, ends as an uninterrupted one."""
    with torch.no_grad():
        first, second = (answer_logits(keeping, collate(keeping, samples)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_models_training_mode_does_not_change(keeping: VisionLanguageModel, samples: list[Encoded]) -> None:
    keeping.model.train()
    collate(keeping, samples)
    assert keeping.model.training
    assert all(module.training for module in keeping.model.modules())


def test_a_blurred_picture_has_its_own_features(
    keeping: VisionLanguageModel, encoder: Encoder, federation: FederatedData, vlm: VisionLanguageModel
) -> None:
    """The store identifies copies by the processor's output, whatever their samples' ids."""
    plain = federation.dataset.test[:3]
    for samples in (plain, reduced_copy(plain, "blur-1", 0)):
        encoded = [encoder(sample) for sample in samples]
        with torch.no_grad():
            kept, anew = (answer_logits(model, collate(model, encoded)) for model in (keeping, vlm))
        torch.testing.assert_close(kept, anew, atol=1e-4, rtol=0)
    assert encoder(plain[0]).picture != encoder(reduced_copy(plain, "blur-1", 0)[0]).picture
