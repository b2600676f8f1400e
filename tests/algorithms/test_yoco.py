from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedmllm.algorithms.yoco import YOCO, Supervision


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_the_loss_terms_equal_the_docstrings_formula(reference: bool, progress: float) -> None:
    """Compared with NumPy in float64; g is 1 at the start and (1 + gamma) / 2 halfway."""
    method = YOCO(sign_weight=0.7, gamma=9.0, sparse_weight=0.01, reference=reference)
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    sign = torch.randn(4, 2, dtype=torch.float64).sign()
    now = {"m.lora_A.weight": a, "m.lora_B.weight": b}
    found = Supervision(method, {"m.lora_B.weight": sign}).value(now, {}, progress)
    gamma = {0.0: 1.0, 0.5: 5.0}[progress]
    supervised = np.linalg.norm(np.tanh(gamma * b.numpy()) - sign.numpy()) / (math.sqrt(8) + 1e-6)
    if reference:
        spread = 0.1 - 0.09 * (gamma - 1) / 8
        rest = spread * np.linalg.norm(a.numpy().T @ a.numpy() - np.eye(5)) ** 2
    else:
        rest = 0.01 * np.abs(a.numpy()).sum()
    assert float(found) == pytest.approx(0.7 * supervised + rest, rel=1e-9)
