"""FedMLLM: Empowering Federated Fine-Tuning of Multimodal LLMs. Xu et al., arXiv 2411.14717, 2024: the modality-agnostic prompt."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.strategies.base import Strategy


@dataclass(frozen=True)
class AgnosticPrompt(Strategy):
    """Uses the same wording for every sample, whatever its modalities, in training and testing. The prompt asks to answer regardless of modality.

    The setting ``data.prompt: agnostic``, which is the default, implements this strategy. Naming the strategy makes an experiment with
    another prompt an error. ``data.prompt: neutral`` is the same wording without the sentence about modality.
    """

    wording = "agnostic"
