"""The last decoder layer, restricted to the columns that are read."""

from __future__ import annotations

import torch

from fedmllm.models.last_layer import shorten


def test_an_unknown_decoder_is_not_shortened() -> None:
    """No list of layers, an empty list, and a layer whose attention mixes columns before its scores."""

    class Decoder(torch.nn.Module):
        def get_decoder(self) -> torch.nn.Module:
            return self

    empty, known, convolution = Decoder(), Decoder(), Decoder()
    empty.layers = torch.nn.ModuleList()
    for decoder in (known, convolution):
        decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
        decoder.layers[0].self_attn = torch.nn.ModuleDict({f"{name}_proj": torch.nn.Linear(2, 2) for name in "qkvo"})
    convolution.layers[0].self_attn["conv"] = torch.nn.Conv1d(2, 2, 1)
    assert shorten(known)
    assert not shorten(convolution)
    assert not shorten(empty)
    assert not shorten(Decoder())
