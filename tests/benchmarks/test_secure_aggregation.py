"""The benchmark of secure aggregation on tiny vectors. It checks every sum itself."""

from __future__ import annotations

import numpy as np
import pytest
import secure_aggregation
from secure_aggregation import SERVER, Sizes, measure, session, table


def test_a_row_has_all_participants_and_the_sizes_of_one_client() -> None:
    row = measure(4, 0.004, 1, 2)
    assert row["seconds_least"] <= row["seconds"] <= row["seconds_most"]
    assert 0 < row["client_seconds"] < row["seconds"]
    assert 0 < row["server_seconds"] < row["seconds"]
    assert 4000 < row["bytes_up"] < 4000 + 4 * 600 + 2000
    assert table([row]).count("\n") == 2


def test_sizes_are_those_of_one_client() -> None:
    sizes = Sizes("client-00")
    clock = session(3, np.zeros(10, np.uint32), 0, sizes)
    assert clock.seconds.keys() == {SERVER, "client-00", "client-01", "client-02"}
    before = sizes.up
    sizes.add("client-01", None, None)
    assert sizes.up == before > 0


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    total = secure_aggregation.Server.total
    monkeypatch.setattr(secure_aggregation.Server, "total", lambda self: total(self)._replace(vector=np.ones(10, np.uint32)))
    with pytest.raises(RuntimeError, match="the sum is wrong"):
        session(3, np.zeros(10, np.uint32), 0, None)
