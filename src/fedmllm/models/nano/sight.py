"""The vision tower before it meets the decoder: it learns to tell digits and inks, as a classifier.

A whole model taught through its answers alone takes several times as long to read: the decoder has to find out that the
picture matters first. Larger models start from a trained tower for the same reason.
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
    """Digits and ink from the tower's patches; only the tower outlives the lesson.

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
        """Logits of left digit, right digit and ink, each of shape (pictures, classes)."""
        patches = self.tower(pixel_values=pixels).last_hidden_state.unflatten(1, (self.side, self.side))
        left, right = (self.head(half.mean((1, 2))) for half in patches.chunk(2, dim=2))
        return left[:, :10], right[:, :10], (left + right)[:, 10:]

    def loss(self, pixels: Tensor, truth: Tensor) -> Tensor:
        """Sum of the three mean cross-entropies; ``truth`` holds left digit, right digit and ink per row."""
        losses = [F.cross_entropy(logits, truth[:, i]) for i, logits in enumerate(self(pixels))]
        return torch.stack(losses).sum()


def sheets(vlm: VisionLanguageModel, rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Pictures in the pretraining handwriting, preprocessed, and what they show, shape (pictures, 3)."""
    scenes = [draw_scene(rng) for _ in range(count)]
    pictures = [sheet(scene.digits, scene.ink, "pretrain", rng) for scene in scenes]
    pixels = vlm.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    return pixels, torch.tensor([(*scene.digits, list(INKS).index(scene.ink)) for scene in scenes])
