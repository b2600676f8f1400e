"""Pretrains the vision tower alone, as a classifier of digits and inks.

A whole model that trains only through its answers takes several times as long to read, because the decoder must first discover
that the picture matters. Larger models start from a trained tower for the same reason.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmllm.data.datasets.digits.scans import INKS, sheet
from fedmllm.models.load import VisionLanguageModel
from fedmllm.models.nano.scenes import draw_scene


class SightExam(nn.Module):
    """Classifies digits and ink from the tower's patches. Only the tower is kept after this stage.

    Each half of the picture is averaged over its patches, h_left and h_right, and read by one linear map W:
    left digit ``(W h_left)[:10]``, right digit ``(W h_right)[:10]``, ink ``(W h_left + W h_right)[10:]``.
    """

    def __init__(self, vlm: VisionLanguageModel) -> None:
        super().__init__()
        vision = vlm.model.config.vision_config
        self.tower = vlm.model.model.vision_tower
        self.side = vision.image_size // vision.patch_size
        self.head = nn.Linear(vision.hidden_size, 10 + len(INKS))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits of left digit, right digit and ink, each of shape (pictures, classes)."""
        patches = self.tower(pixel_values=pixels).last_hidden_state.unflatten(1, (self.side, self.side))
        left, right = (self.head(half.mean((1, 2))) for half in patches.chunk(2, dim=2))
        return left[:, :10], right[:, :10], (left + right)[:, 10:]

    def loss(self, pixels: Tensor, truth: Tensor) -> Tensor:
        """Return the sum of the three mean cross-entropies. Each row of ``truth`` holds left digit, right digit and ink."""
        losses = [F.cross_entropy(logits, truth[:, i]) for i, logits in enumerate(self(pixels))]
        return torch.stack(losses).sum()


def sheets(vlm: VisionLanguageModel, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Draw preprocessed pictures in the pretraining handwriting, and their left digit, right digit and ink, shape (pictures, 3)."""
    scenes = [draw_scene(rng) for _ in range(count)]
    pictures = [sheet(scene.digits, scene.ink, "pretrain", rng) for scene in scenes]
    pixels = vlm.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([(*scene.digits, list(INKS).index(scene.ink)) for scene in scenes])
