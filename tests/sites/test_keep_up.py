"""Processes that are kept up, with small ones of the test's own."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedmllm.sites.processes import Kept, tend


def script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def keeper(names: str, text: str, folder: Path) -> list[str]:
    """A process that keeps up one of that text for each letter; their logs are named so."""
    return script(
        "import sys; from pathlib import Path; from fedmllm.sites.processes import Kept, keep_up\n"
        f"keep_up([Kept(name, [sys.executable, '-c', {text!r}], Path({str(folder)!r}) / name, 1) for name in {names!r}],\n"
        "        lambda words: print(words, flush=True))"
    )


def tended(kept: Kept, until: str, told: list[str], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not any(until in line for line in told) and time.monotonic() < end:
        kept.tend(told.append)
        time.sleep(0.05)
    assert any(until in line for line in told), told


def test_what_ends_is_started_anew_after_a_delay_and_says_why(tmp_path: Path) -> None:
    told: list[str] = []
    words = "print('Exit Code: 7'); print('the key'); print('was refused.'); import sys; sys.exit(1)"
    kept = Kept("node", script(words), tmp_path / "log", 0.5)
    tended(kept, "exited", told)
    assert told[-1] == f"node exited with code 1 (the key was refused.); see {tmp_path / 'log'}; restarting in 0.5 s"
    since = time.monotonic()
    while len(told) < 3:
        kept.tend(told.append)
        time.sleep(0.02)
    assert time.monotonic() - since > 0.4
    assert told[2].startswith("node started, process ")
    kept.stop()


def test_what_is_done_once_is_not_started_again(tmp_path: Path) -> None:
    told: list[str] = []
    kept = Kept("admitting", script("print('hello')"), tmp_path / "log", 0, once=True)
    while not kept.done:
        kept.tend(told.append)
        time.sleep(0.02)
    kept.tend(told.append)
    assert kept.process is None
    assert told == []
    kept.stop()


@pytest.mark.parametrize("deaf", [False, True])
def test_what_ends_with_another_is_started_anew_at_once_unless_it_had_to_be_forced(deaf: bool, tmp_path: Path) -> None:
    told: list[str] = []
    words = (
        "import signal, time; "
        + ("signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else "")
        + "print(1, flush=True); time.sleep(60)"
    )
    node = Kept("node", script(words), tmp_path / "node", 1.5, patience=0.2 if deaf else 10, ends_with="worker")
    worker = Kept("worker", script("import time; time.sleep(60)"), tmp_path / "worker", 60)
    tend([node, worker], told.append)
    while not (tmp_path / "node").read_text():
        time.sleep(0.02)
    assert node.process is not None
    assert worker.process is not None
    first = node.process.pid
    worker.process.kill()
    worker.process.wait()
    tend([node, worker], told.append)
    assert told[-1] == f"node was stopped because worker exited; restarting in {1.5 if deaf else 0:g} s"
    assert not Path(f"/proc/{first}").exists()
    tend([node, worker], told.append)
    assert (node.process is None) == deaf
    node.stop()


def test_what_does_not_end_by_itself_is_ended(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    kept = Kept("deaf", script(deaf), tmp_path / "log", 1)
    kept.tend(lambda words: None)
    while "deaf" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    process, kept.patience = kept.process, 0.2
    assert process is not None
    kept.stop()
    assert process.poll() == -9


def test_what_does_not_end_when_it_is_killed_is_left_and_it_is_told(tmp_path: Path) -> None:
    """As what waits for a device that does not answer; here nobody is told of its end."""
    told: list[str] = []
    kept = Kept("stuck", script("import time; time.sleep(60)"), tmp_path / "log", 1, patience=0.2)
    kept.tend(lambda words: None)
    process = kept.process
    assert process is not None
    end = process.wait

    def never(timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("stuck", timeout or 0)

    process.wait = never  # type: ignore[method-assign]
    assert not kept.stop(told.append)
    assert told == ["stuck is still running 0.2 s after it was killed; leaving it"]
    assert end(20) < 0


def test_all_end_with_the_one_that_keeps_them_up(tmp_path: Path) -> None:
    """The process of ``fedmllm site up``: terminated, it terminates its own, and ends well."""
    with subprocess.Popen(keeper("a", "import time; time.sleep(60)", tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline().split("process ")[1].split(",")[0])
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout.read() == "stopping\n"
    assert not Path(f"/proc/{child}").exists()


def test_an_impatient_end_leaves_no_process_behind(tmp_path: Path) -> None:
    """Terminated again while it waits for its own to end, which takes a second."""
    slow = (
        "import signal, time; signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), exit())); print('there', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(keeper("ab", slow, tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [int(process.stdout.readline().split("process ")[1].split(",")[0]) for _ in "ab"]
        while not all((tmp_path / name).exists() and (tmp_path / name).read_text() for name in "ab"):
            time.sleep(0.02)
        for _ in range(3):
            process.terminate()
            time.sleep(0.3)
        assert process.wait(20) == 0
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_the_last_line_says_why_where_flower_does_not(tmp_path: Path) -> None:
    told: list[str] = []
    kept = Kept("worker", script("raise SystemExit('the port is taken')"), tmp_path / "log", 60)
    tended(kept, "exited", told)
    assert told[-1].startswith("worker exited with code 1 (the port is taken); see ")


def test_nothing_heavy_is_imported_to_keep_processes_up() -> None:
    code = "import sys, fedmllm.sites.processes; print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'flwr', 'pydantic'}))"
    assert subprocess.run(script(code), capture_output=True, text=True, check=True).stdout == "[]\n"
