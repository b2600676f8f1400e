"""Processes that are restarted when they exit, tested with small scripts."""

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
    """The command of a process that keeps up one script for each letter in ``names``, which also names its log."""
    return script(
        "import sys; from pathlib import Path; from fedmllm.sites.processes import Kept, keep_up\n"
        f"keep_up([Kept(name, [sys.executable, '-c', {text!r}], Path({str(folder)!r}) / name, 1) for name in {names!r}],\n"
        "        lambda words: print(words, flush=True))"
    )


def tend_until(kept: Kept, until: str, messages: list[str], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not any(until in line for line in messages) and time.monotonic() < end:
        kept.tend(messages.append)
        time.sleep(0.05)
    assert any(until in line for line in messages), messages


def test_a_process_that_ends_is_restarted_after_a_delay_with_its_reason(tmp_path: Path) -> None:
    messages: list[str] = []
    words = "print('Exit Code: 7'); print('the key'); print('was refused.'); import sys; sys.exit(1)"
    kept = Kept("node", script(words), tmp_path / "log", 0.5)
    tend_until(kept, "exited", messages)
    assert messages[-1] == f"node exited with code 1 (the key was refused.); see {tmp_path / 'log'}; restarting in 0.5 s"
    since = time.monotonic()
    while len(messages) < 3:
        kept.tend(messages.append)
        time.sleep(0.02)
    assert time.monotonic() - since > 0.4
    assert messages[2].startswith("node started, process ")
    kept.stop()


def test_a_process_that_runs_once_is_not_restarted(tmp_path: Path) -> None:
    messages: list[str] = []
    kept = Kept("admitting", script("print('hello')"), tmp_path / "log", 0, once=True)
    while not kept.done:
        kept.tend(messages.append)
        time.sleep(0.02)
    kept.tend(messages.append)
    assert kept.process is None
    assert messages == []
    kept.stop()


@pytest.mark.parametrize("deaf", [False, True])
def test_a_dependent_process_is_restarted_at_once_unless_it_had_to_be_killed(deaf: bool, tmp_path: Path) -> None:
    messages: list[str] = []
    words = (
        "import signal, time; "
        + ("signal.signal(signal.SIGTERM, signal.SIG_IGN); " if deaf else "")
        + "print(1, flush=True); time.sleep(60)"
    )
    node = Kept("node", script(words), tmp_path / "node", 1.5, patience=0.2 if deaf else 10, ends_with="worker")
    worker = Kept("worker", script("import time; time.sleep(60)"), tmp_path / "worker", 60)
    tend([node, worker], messages.append)
    while not (tmp_path / "node").read_text():
        time.sleep(0.02)
    assert node.process is not None
    assert worker.process is not None
    first = node.process.pid
    worker.process.kill()
    worker.process.wait()
    tend([node, worker], messages.append)
    assert messages[-1] == f"node was stopped because worker exited; restarting in {1.5 if deaf else 0:g} s"
    assert not Path(f"/proc/{first}").exists()
    tend([node, worker], messages.append)
    assert (node.process is None) == deaf
    node.stop()


def test_a_process_that_ignores_termination_is_killed(tmp_path: Path) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    kept = Kept("deaf", script(deaf), tmp_path / "log", 1)
    kept.tend(lambda words: None)
    while "deaf" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    process, kept.patience = kept.process, 0.2
    assert process is not None
    kept.stop()
    assert process.poll() == -9


def test_a_process_that_survives_a_kill_is_left_and_reported(tmp_path: Path) -> None:
    """Like a process that waits for a device that does not respond. Here waiting for its end always times out."""
    messages: list[str] = []
    kept = Kept("stuck", script("import time; time.sleep(60)"), tmp_path / "log", 1, patience=0.2)
    kept.tend(lambda words: None)
    process = kept.process
    assert process is not None
    end = process.wait

    def never(timeout: float | None = None) -> int:
        raise subprocess.TimeoutExpired("stuck", timeout or 0)

    process.wait = never  # type: ignore[method-assign]
    assert not kept.stop(messages.append)
    assert messages == ["stuck is still running 0.2 s after it was killed; leaving it"]
    assert end(20) < 0


def test_children_end_with_their_keeper(tmp_path: Path) -> None:
    """``fedmllm site up``, once terminated, terminates its children and exits with code 0."""
    with subprocess.Popen(keeper("a", "import time; time.sleep(60)", tmp_path), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline().split("process ")[1].split(",")[0])
        process.terminate()
        assert process.wait(20) == 0
        assert process.stdout.read() == "stopping\n"
    assert not Path(f"/proc/{child}").exists()


def test_repeated_termination_leaves_no_process_behind(tmp_path: Path) -> None:
    """It is terminated again while it waits a second for its children."""
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


def test_the_reason_falls_back_to_the_last_line_of_output(tmp_path: Path) -> None:
    messages: list[str] = []
    kept = Kept("worker", script("raise SystemExit('the port is taken')"), tmp_path / "log", 60)
    tend_until(kept, "exited", messages)
    assert messages[-1].startswith("worker exited with code 1 (the port is taken); see ")


def test_keeping_processes_up_imports_no_heavy_library() -> None:
    code = "import sys, fedmllm.sites.processes; print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'flwr', 'pydantic'}))"
    assert subprocess.run(script(code), capture_output=True, text=True, check=True).stdout == "[]\n"
