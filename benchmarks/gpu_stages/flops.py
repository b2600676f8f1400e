"""The operations that a step needs, without any extra work of a program: the numerator of the model FLOP utilization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmllm.models.encoding import Encoded


def needed_flops(text: Any, samples: Sequence[Encoded], rank: int = 8) -> float:
    """Return the floating-point operations of training a dense decoder's adapters on q, k, v and o once on each sample.

    A decoder has N layers of W weights. A sample has L tokens, of which a belong to its answer. H = heads x head size. A token's product with n
    weights takes 2 n operations, and a layer's factors F = F_kv + F_qo have r (inputs + outputs) weights:

        frozen, forward and gradient through it    4 W L (N - 1), and in the last layer 4 W_kv L + 4 (W - W_kv) a
        causal attention, half of the square       6 L^2 H (N - 1); the last layer's, only for the answer's tokens, is left out
        factors, forward and both gradients        6 F L (N - 1), and in the last layer 6 F_kv L + 6 F_qo a
        output head                                4 vocabulary width a

    The vision tower is not counted, because features are computed once. Padding and recomputation are not counted, because they are not needed. The
    gradient with respect to the first layer's input is counted although it is not needed; it is less than a thousandth.

    Args:
        text: the decoder's config, with dense layers of attention and gated feed-forward.
        samples: the samples, for their lengths.
        rank: the factors' rank.
    """
    width, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or width // heads
    rest, kv = 2 * width * heads * size + 3 * width * text.intermediate_size, 2 * width * groups * size
    factors_qo, factors_kv = 2 * rank * (width + heads * size), 2 * rank * (width + groups * size)
    total = 0.0
    for sample in samples:
        # Tokens times layers: for weights that all tokens pass, and for weights that only the answer's tokens pass in the last layer.
        tokens, shortened = len(sample.input_ids), sample.answer_length
        everywhere = tokens * text.num_hidden_layers
        elsewhere = tokens * (text.num_hidden_layers - 1) + shortened
        total += (4 * kv + 6 * factors_kv) * everywhere + (4 * rest + 6 * factors_qo) * elsewhere
        total += 6 * tokens**2 * heads * size * (text.num_hidden_layers - 1) + 4 * text.vocab_size * width * shortened
    return total
