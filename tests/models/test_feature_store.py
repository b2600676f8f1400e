from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedmllm.models.feature_store import TensorStore


def filled(key: int, size: int) -> dict[str, torch.Tensor]:
    return {"x": torch.full((size,), float(key)), "flags": torch.tensor([key % 2 == 0, True])}


@given(sizes=st.lists(st.integers(0, 200), min_size=1, max_size=60), limit=st.integers(128, 4096))
def test_the_store_returns_the_newest_entries_unchanged(sizes: list[int], limit: int) -> None:
    store = TensorStore(limit)
    for key, size in enumerate(sizes):
        store.put(key, filled(key, size))
        held = [k for k in range(key + 1) if store.get(k) is not None]
        assert len(held) == len(store)
        for k in held:
            found = store.get(k)
            assert found is not None
            assert all(torch.equal(found[name], tensor) for name, tensor in filled(k, sizes[k]).items())
        kept = [k for k in range(key + 1) if -(-4 * sizes[k] // 64) * 64 + 64 <= limit]
        assert held == kept[len(kept) - len(held) :]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_every_number_format_comes_back(dtype: torch.dtype) -> None:
    store, tensor = TensorStore(1 << 12), torch.arange(6).reshape(2, 3).to(dtype)
    store.put("a", {"x": tensor, "none": tensor[:0]})
    found = store.get("a")
    assert found is not None
    assert torch.equal(found["x"], tensor)
    assert found["none"].shape == (0, 3)


def test_a_returned_copy_survives_eviction() -> None:
    store = TensorStore(256)
    store.put("a", {"x": torch.ones(32)})
    first = store.get("a")
    for key in range(9):
        store.put(key, {"x": torch.zeros(32)})
    assert store.get("a") is None
    assert first is not None
    assert float(first["x"].sum()) == 32


def test_a_full_disk_disables_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> int:
        raise OSError(28, "No space left on device")

    store = TensorStore(1 << 12)
    store.put("a", {"x": torch.ones(3)})
    monkeypatch.setattr(store, "_write", full)
    store.put("b", {"x": torch.ones(3)})
    assert store.get("a") is not None
    assert store.get("b") is None
