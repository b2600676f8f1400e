"""Features kept in place of pictures."""

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
    """The embedded model, which the errors name."""
    return nano


@pytest.fixture
def keeping(vlm: VisionLanguageModel) -> VisionLanguageModel:
    return replace(vlm, features=VisionFeatures(vlm, 1 << 24))


@pytest.fixture
def samples(encoder: Encoder, federation: FederatedData) -> list[Encoded]:
    return [encoder(sample) for sample in federation.dataset.test[:6]]


def count_calls(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per pass of the vision tower."""
    tower, calls = vlm.model.get_base_model().model.vision_tower, []
    forward = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(tower, "forward", counted)
    return calls


def test_a_model_that_would_not_read_them_is_refused(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of an older Transformers takes any argument, and trains without the pictures that it was fed so."""
    decoder = vlm.model.get_base_model()
    monkeypatch.setattr(type(decoder), "forward", lambda self, input_ids=None, pixel_values=None, **kwargs: None)
    with pytest.raises(ModelError, match=r"'nano' does not accept image features instead of images; set engine\.feature_bytes to 0"):
        VisionFeatures(vlm, 1 << 20)


def test_each_picture_is_seen_once(keeping: VisionLanguageModel, samples: list[Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(keeping, monkeypatch)
    for order in (samples, samples[::-1], samples[2:4]):
        answer_logits(keeping, collate(keeping, order))
    assert len(calls) == len({sample.picture for sample in samples}) == 6


def test_the_second_time_is_the_first_bit_for_bit(keeping: VisionLanguageModel, samples: list[Encoded]) -> None:
    """So that a resumed run, whose store is empty, ends as an uninterrupted one."""
    with torch.no_grad():
        first, second = (answer_logits(keeping, collate(keeping, samples)) for _ in range(2))
    assert torch.equal(first, second)


def test_the_mode_of_the_model_stays(keeping: VisionLanguageModel, samples: list[Encoded]) -> None:
    keeping.model.train()
    collate(keeping, samples)
    assert keeping.model.training
    assert all(module.training for module in keeping.model.modules())


def test_a_blurred_picture_is_another(
    keeping: VisionLanguageModel, encoder: Encoder, federation: FederatedData, vlm: VisionLanguageModel
) -> None:
    """The store tells copies apart by what the processor made of them, whatever their samples are called."""
    plain = federation.dataset.test[:3]
    for samples in (plain, reduced_copy(plain, "blur-1", 0)):
        encoded = [encoder(sample) for sample in samples]
        with torch.no_grad():
            kept, anew = (answer_logits(model, collate(model, encoded)) for model in (keeping, vlm))
        torch.testing.assert_close(kept, anew, atol=1e-4, rtol=0)
    assert encoder(plain[0]).picture != encoder(reduced_copy(plain, "blur-1", 0)[0]).picture
