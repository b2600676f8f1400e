"""What a step has to compute, whatever a program computes besides: the numerator of the model FLOP utilization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedmllm.models.encoding import Encoded


def needed_flops(text: Any, samples: Sequence[Encoded], rank: int = 8) -> float:
    """Floating-point operations of training a dense decoder's adapters on q, k, v and o once on each sample.

    With N layers of W weights, L tokens of a sample, a of them its answer's, H = heads x head size, 2 n operations for a token's product with n
    weights, and r (inputs + outputs) weights of a layer's factors F = F_kv + F_qo:

        frozen, forward and gradient through it    4 W L (N - 1), and in the last layer 4 W_kv L + 4 (W - W_kv) a
        causal attention, half of the square       6 L^2 H (N - 1), and in the last layer as many as there are pairs with the answer: left out
        factors, forward, through and for them     6 F L (N - 1), and in the last layer 6 F_kv L + 6 F_qo a
        output head                                4 vocabulary width a

    The vision part is not in it: features are computed once. Neither is what need not be done: padding, and what is computed again. The gradient
    with respect to the first layer's input is counted, although nobody needs it: less than a thousandth.

    Args:
        text: the decoder's config, with dense layers of attention and gated feed-forward.
        samples: with their lengths.
        rank: of the factors.
    """
    width, heads, groups = text.hidden_size, text.num_attention_heads, text.num_key_value_heads
    size = getattr(text, "head_dim", None) or width // heads
    rest, kv = 2 * width * heads * size + 3 * width * text.intermediate_size, 2 * width * groups * size
    factors_qo, factors_kv = 2 * rank * (width + heads * size), 2 * rank * (width + groups * size)
    total = 0.0
    for sample in samples:
        # Layer by layer of tokens: what all columns pass, and what only those of the answer pass in the last layer.
        tokens, shortened = len(sample.input_ids), sample.answer_length
        everywhere = tokens * text.num_hidden_layers
        elsewhere = tokens * (text.num_hidden_layers - 1) + shortened
        total += (4 * kv + 6 * factors_kv) * everywhere + (4 * rest + 6 * factors_qo) * elsewhere
        total += 6 * tokens**2 * heads * size * (text.num_hidden_layers - 1) + 4 * text.vocab_size * width * shortened
    return total
