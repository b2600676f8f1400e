"""FedNova as FedAvg; the rule itself is compared in ``contracts``."""

from __future__ import annotations

import dataclasses

import torch

from server_rounds import begin, build, server_round, updates


def test_fednova_equals_fedavg_for_equal_step_counts() -> None:
    state = begin(build("fednova"))
    sent = [dataclasses.replace(s, metrics={"steps": 4.0}) for s in updates(build("fednova"), state)]
    nova_end, average_end = (server_round(build(name), state, sent).weights for name in ("fednova", "fedavg"))
    for key in nova_end:
        torch.testing.assert_close(nova_end[key], average_end[key], atol=1e-7, rtol=0)
