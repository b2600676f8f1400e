"""The limits of the device: matrix products, copies, launches, attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gpu_stages.bench import Bench

WIDTH, INNER, KV, HEADS, HEAD = 2048, 11008, 256, 16, 128
"""Dimensions of Qwen2.5-VL-3B's decoder."""


def ceilings(bench: Bench) -> None:
    """Add the rows ``matrix`` (the ceiling of every utilization in the table), ``product ...``, ``copy``, ``launch``, ``attention ...``."""
    size = 256 if bench.tiny else 8192
    _product(bench, "matrix", size, size, size)
    for rows in (64, 128) if bench.tiny else (2400, 12000):
        for name, inputs, outputs in (("q", WIDTH, WIDTH), ("k", WIDTH, KV), ("up", WIDTH, INNER), ("down", INNER, WIDTH)):
            _product(
                bench, f"product {name}, {rows:,} rows", rows, outputs // (16 if bench.tiny else 1), inputs // (16 if bench.tiny else 1)
            )
        _narrow(bench, rows)
    source = torch.randn(2**20 if bench.tiny else 2**28, device=bench.device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    seconds = bench.fast(lambda: target.copy_(source))
    bench.row("copy", seconds=seconds, bytes_per_s=2 * source.nbytes / seconds)
    one = torch.zeros(1, device=bench.device)
    bench.row("launch", seconds=bench.fast(lambda: one.add_(1), 1000))
    for tokens in (30,) if bench.tiny else (300, 1200):
        for masked in (False, True):
            _attention(bench, 40 * 300 // tokens if not bench.tiny else 2, tokens, masked)


def _product(bench: Bench, name: str, rows: int, outputs: int, inputs: int) -> None:
    x = torch.randn(rows, inputs, device=bench.device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=bench.device, dtype=torch.bfloat16)
    seconds = bench.fast(lambda: F.linear(x, weight))
    bench.row(name, seconds=seconds, flops_per_s=2 * rows * inputs * outputs / seconds)


def _narrow(bench: Bench, rows: int) -> None:
    """Time the products of ten clients' A with their rows: batched by client, and all at once with concatenated ranks."""
    x = torch.randn(10, rows // 10, WIDTH, device=bench.device, dtype=torch.bfloat16)
    a = torch.randn(10, 8, WIDTH, device=bench.device, dtype=torch.bfloat16)
    bench.row(f"factors by client, {rows:,} rows", seconds=bench.fast(lambda: torch.bmm(x, a.mT)))
    flat, wide = x.reshape(-1, WIDTH), a.reshape(-1, WIDTH)
    bench.row(f"factors concatenated, {rows:,} rows", seconds=bench.fast(lambda: F.linear(flat, wide)))


def _attention(bench: Bench, batch: int, tokens: int, masked: bool) -> None:
    """Time attention forward and backward, with grouped keys as Transformers calls it: repeated if there is a mask."""
    groups = HEADS if masked else 2
    shapes = ((HEADS, tokens), (groups, tokens), (groups, tokens))
    q, k, v = (torch.randn(batch, *shape, HEAD, device=bench.device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=bench.device).tril().expand(batch, 1, tokens, tokens) if masked else None
    if mask is not None:
        mask = mask.clone()
        # One token of padding makes the mask necessary.
        mask[:, :, 1:, 0] = False

    def work() -> None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=not masked)
        out.sum().backward()
        q.grad = k.grad = v.grad = None

    seconds = bench.fast(work)
    flops = 3 * 2 * tokens**2 * HEADS * HEAD * batch
    bench.row(f"attention, {tokens:,} tokens, {'mask' if masked else 'causal'}", seconds=seconds, flops_per_s=flops / seconds)
