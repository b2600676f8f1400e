"""The memory plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmllm.data.federated import FederatedData
from fedmllm.models import memory
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.memory import CPU_TOKENS, clients_at_once, kept_bytes, token_budget
from fedmllm.training.batches import Encoder


def test_what_is_kept_grows_with_the_tokens_and_is_nothing_without_a_gradient(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData
) -> None:
    """At least what a decoder layer's attention and gate need; at most all of a float32 pass's intermediate results, generously."""
    samples = sorted(map(encoder, federation.clients["client-00"]), key=lambda sample: len(sample.input_ids))
    text = vlm.model.config.get_text_config()
    least = 4 * text.num_hidden_layers * (4 * text.hidden_size + 2 * text.intermediate_size)
    for sample in (samples[0], samples[-1]):
        assert least < kept_bytes(vlm, sample) / len(sample.input_ids) < 5 * least
    with torch.no_grad():
        assert kept_bytes(vlm, samples[0]) == 0


def test_the_budget_is_the_device_s(
    vlm: VisionLanguageModel, encoder: Encoder, federation: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = encoder(federation.clients["client-00"][0])
    assert token_budget(vlm, sample) == CPU_TOKENS
    monkeypatch.setattr(memory, "kept_bytes", lambda vlm, sample: 1000 * len(sample.input_ids))
    for free, tokens in ((1 << 20, 629), (100, 1)):
        monkeypatch.setattr(memory, "_free_bytes", lambda device, free=free: free)
        assert token_budget(replace(vlm, device=torch.device("cuda")), sample) == tokens


def test_a_wave_is_as_large_as_a_gpu_s_memory_allows(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client's tensors take 16 bytes of each of 73,728 parameters; a fifth of the memory is theirs."""
    assert clients_at_once(vlm) is None
    for free, clients in ((5 * 16 * 73_728 * 7, 7), (5 * 16 * 73_728 * 7 - 5, 6), (1, 1)):
        monkeypatch.setattr(memory, "_free_bytes", lambda device, free=free: free)
        assert clients_at_once(replace(vlm, device=torch.device("cuda"))) == clients
