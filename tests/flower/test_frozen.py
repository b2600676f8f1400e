"""Workers' copies of the change to the frozen weights equal the server's bit for bit, in any cohort order, and nothing is sent twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmllm import factors
from fedmllm import weights as W
from fedmllm.errors import RunError
from fedmllm.flower.frozen import BaseHistory, KeptBase, Missing
from fedmllm.types import Broadcast, Weights

MODULE, SIDE, RANK = "layer.q_proj", 64, 2
WEIGHTS: Weights = {}


def step_of(number: int) -> Weights:
    generator = torch.Generator().manual_seed(number)
    pair = factors.Pair(torch.randn(RANK, SIDE, generator=generator), torch.randn(SIDE, RANK, generator=generator))
    return factors.named({MODULE: pair})


def broadcast(round_num: int, first: Weights | None = None, skipped: tuple[int, ...] = ()) -> Broadcast:
    """A round's broadcast, recomputed from the first round."""
    base = first or {}
    for number in range(1, round_num + 1):
        base = base if number in skipped else factors.accumulated(base, step_of(number))
    step = {} if round_num in (0, *skipped) else step_of(round_num)
    return Broadcast(round_num, WEIGHTS, base=base, base_step=step)


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(other[name], tensor) for name, tensor in one.items())


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1, max_size=7), st.sets(st.integers(1, 6)), st.booleans())
@settings(max_examples=40)
def test_every_client_has_the_servers_frozen_weights_in_any_cohort_order(
    tmp_path_factory: pytest.TempPathFactory, cohorts: list[set[str]], skipped: set[int], begins: bool
) -> None:
    folder = tmp_path_factory.mktemp("base")
    first = {MODULE: torch.randn(SIDE, SIDE)} if begins else {}
    server, sent = BaseHistory(folder / "server"), 0
    for round_num, cohort in enumerate(cohorts):
        now = broadcast(round_num, first, tuple(skipped))
        server.note(now)
        for client in sorted(cohort):
            missing = server.missing(client, now)
            sent += len(missing.steps)
            # Rounds skipped before the first merge leave no history, so everything is sent once.
            assert begins or 1 in skipped or not missing.whole
            assert same(KeptBase(folder / client).brought_up(missing, round_num, first), now.base)
            server.answered(client, now)
    last = {client: max((i for i, cohort in enumerate(cohorts) if client in cohort), default=0) for client in "abc"}
    # Rounds before the first merge have no steps to send.
    assert sent <= sum(last.values())


def test_a_client_receives_the_steps_that_it_lacks(tmp_path: Path) -> None:
    server = BaseHistory(tmp_path)
    for round_num in range(4):
        server.note(broadcast(round_num))
    server.answered("a", broadcast(2))
    assert list(server.missing("a", broadcast(3)).steps) == [3]
    assert list(server.missing("new", broadcast(3)).steps) == [1, 2, 3]
    assert server.missing("a", Broadcast(3, WEIGHTS)) == Missing(session=server.session)


@pytest.mark.parametrize("how", ["many steps", "lost history"])
def test_the_whole_change_is_sent_where_it_is_smaller_or_steps_are_lost(how: str, tmp_path: Path) -> None:
    server, last = BaseHistory(tmp_path / "server"), SIDE // (2 * RANK) + 1 if how == "many steps" else 3
    for round_num in range(last + 1):
        server.note(broadcast(round_num))
    if how == "lost history":
        (tmp_path / "server" / "2.safetensors").unlink()
    now = broadcast(last)
    missing = server.missing("a", now)
    assert missing.since is None
    assert W.num_bytes(missing.whole) == 4 * SIDE * SIDE
    kept = KeptBase(tmp_path / "a")
    assert same(kept.brought_up(missing, last, {}), now.base)
    # Afterwards only steps are sent.
    server.answered("a", now)
    now = broadcast(last + 1)
    server.note(now)
    assert same(kept.brought_up(server.missing("a", now), last + 1, {}), now.base)


def test_a_client_that_lost_its_copy_receives_it_again(tmp_path: Path) -> None:
    server, kept = BaseHistory(tmp_path / "server"), KeptBase(tmp_path / "a")
    for round_num in range(3):
        now = broadcast(round_num)
        server.note(now)
        kept.brought_up(server.missing("a", now), round_num, {})
        server.answered("a", now)
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    now = broadcast(3)
    server.note(now)
    with pytest.raises(RunError, match="up to round 2 is no longer stored here; the server sends it with the next task"):
        kept.brought_up(server.missing("a", now), 3, {})
    server.answered("a", now, failed=True)
    assert same(kept.brought_up(server.missing("a", now), 3, {}), now.base)


def test_a_copy_from_an_earlier_session_is_not_used(tmp_path: Path) -> None:
    """The server died after a round that it did not save. The repeated round has another result."""
    kept = KeptBase(tmp_path / "a")
    kept.brought_up(Missing(0, {1: step_of(77)}, session="1" * 8), 1, {})
    again = BaseHistory(tmp_path / "server")
    again.note(broadcast(1))
    assert same(kept.brought_up(again.missing("a", broadcast(1)), 1, {}), broadcast(1).base)
    assert [path.name.split("-")[1] for path in (tmp_path / "a").iterdir()] == [again.session]


def test_the_last_two_rounds_are_kept_for_workers_that_share_a_folder(tmp_path: Path) -> None:
    server = BaseHistory(tmp_path / "server")
    for round_num in range(6):
        server.note(broadcast(round_num))
        KeptBase(tmp_path / "a").brought_up(server.missing("a", broadcast(round_num)), round_num, {})
        server.answered("a", broadcast(round_num))
    assert sorted(int(path.name.split("-")[0]) for path in (tmp_path / "a").iterdir()) == [4, 5]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    server = BaseHistory(tmp_path)
    server.note(broadcast(1))
    (tmp_path / "1.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(RunError, match=r"1\.safetensors: damaged checkpoint .* delete it"):
        server.missing("a", broadcast(1))
