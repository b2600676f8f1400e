"""FedMLLM: Empowering Federated Fine-Tuning of Multimodal LLMs. Xu et al., arXiv 2411.14717, 2024: the modality-agnostic prompt."""

from __future__ import annotations

from dataclasses import dataclass

from fedmllm.algorithms.strategies.base import Strategy


@dataclass(frozen=True)
class AgnosticPrompt(Strategy):
    """One wording for every sample, whatever it holds, which asks to answer regardless of modality; in training and in testing.

    It acts where samples become prompts: ``data.prompt: agnostic``, the default, is this strategy. Naming it here makes an
    experiment with another prompt an error. ``data.prompt: neutral`` is the same without the sentence that asks so.
    """

    wording = "agnostic"
