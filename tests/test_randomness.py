from __future__ import annotations

import torch

from fedmllm.randomness import derive_seed, generator, torch_randomness


def test_streams_depend_on_seed_purpose_and_keys_only() -> None:
    seeds = [derive_seed(0, "a"), derive_seed(1, "a"), derive_seed(0, "b"), derive_seed(0, "a", 1), derive_seed(0, "a", "1", 2)]
    assert len(set(seeds)) == len(seeds)
    assert generator(3, "x", 1).random() == generator(3, "x", 1).random()


def test_keys_are_not_concatenated() -> None:
    assert derive_seed(0, "a", 1, 23) != derive_seed(0, "a", 12, 3)


def test_the_torch_generator_is_restored() -> None:
    before = torch.random.get_rng_state()
    draws = []
    for _ in range(2):
        with torch_randomness(torch.device("cpu"), 0, "dropout", 1):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.random.get_rng_state(), before)
