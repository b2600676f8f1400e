"""Measure what sending a round costs: in one process, in worker processes on Ray, and at sites over TLS. Almost nothing is trained.

    python benchmarks/engines.py [--engines in_process ray sites] [--clients 2 10 50] [--megabytes 4 100] [--output benchmarks/results/engines.json]

Clients take one step on one sample, because equal pieces of messages, such as zeros, would be sent only once. LoRA's rank sets the size of the adapter that
they send. Seconds are medians over rounds 2 to 5, or 2 and 3 if a round sends two gigabytes or more. Memory is the peak of all processes together, with shared
memory counted once, and the server's own peak. Loopback is the number of bytes per round on the loopback interface of an otherwise idle machine; with sites,
each message passes it several times. Sites take 0.6 GiB each. Rows with more sites than fit in memory are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from fedmllm.run.results import versions

BYTES_OF_RANK = 36_864
"""Bytes of an adapter of the embedded model per unit of rank."""
GIB_OF_SITE = 0.7
COMMAND = [sys.executable, "-W", "ignore", "-m", "fedmllm"]


def experiment(clients: int, megabytes: float) -> dict[str, Any]:
    """Return settings whose rounds do little except send messages."""
    return {
        "data": {"dataset": "digits-claims", "num_train": clients, "num_test": 4, "check_images": False},
        "federation": {
            "num_clients": clients,
            "clients_per_round": clients,
            "num_rounds": 5 if clients * megabytes < 2000 else 3,
            "partition": "iid",
            "min_partition_size": 1,
        },
        "lora": {"r": round(megabytes * 1e6 / BYTES_OF_RANK)},
        "training": {"local_epochs": 1, "batch_size": 1},
        "evaluation": {"every": 0, "baselines": []},
        "engine": {"device": "cpu"},
        "failures": {"deadline": 900, "min_updates": clients, "below": "wait", "pause": 2, "attempts": 60},
    }


@contextlib.contextmanager
def where(engine: str, clients: int, folder: Path) -> Iterator[tuple[list[str], list[int]]]:
    """Start the engine's processes; yield the overrides that select the engine, and the ids of the processes besides the server's."""
    if engine != "sites":
        yield [f"engine.name={'flower' if engine == 'ray' else engine}"], []
        return
    names = [f"client-{i:02d}" for i in range(clients)]
    words = [word for name in names for word in ("--site", name)]
    subprocess.run([*COMMAND, "site", "init", str(folder / "f"), "--address", "127.0.0.1:8470", *words], check=True, capture_output=True)
    server, sites = folder / "f" / "server" / "server.yaml", [folder / "f" / "sites" / name / "site.yaml" for name in names]
    started = [subprocess.Popen([*COMMAND, "server", "up", str(server)], stdout=subprocess.DEVNULL)]
    while not (server.parent / "state.db").exists():
        time.sleep(0.2)
    time.sleep(5)
    started += [subprocess.Popen([*COMMAND, "site", "up", str(site)], stdout=subprocess.DEVNULL) for site in sites]
    try:
        yield ["engine.name=flower", f"engine.server={server}"], [process.pid for process in started]
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(90)


def measure(engine: str, clients: int, megabytes: float) -> dict[str, Any]:
    """Train a run and return its row."""
    with tempfile.TemporaryDirectory() as name, where(engine, clients, Path(name)) as (overrides, beside):
        folder = Path(name)
        (folder / "x.yaml").write_text(yaml.safe_dump(experiment(clients, megabytes)))
        words = ["train", str(folder / "x.yaml"), "--output", str(folder / "run"), "--track", "none", *overrides]
        process = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        peak, own, passed = _watch(process, beside, folder / "run" / "metrics.jsonl")
        if process.returncode:
            assert process.stderr is not None  # noqa: S101
            raise RuntimeError(process.stderr.read().decode()[-2000:])
        lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    later = lines[1:]
    return {
        "engine": engine,
        "clients": clients,
        "megabytes": megabytes,
        "seconds_first": _seconds(lines[0]),
        "seconds": statistics.median(map(_seconds, later)),
        "seconds_least": min(map(_seconds, later)),
        "seconds_most": max(map(_seconds, later)),
        "peak_mib": peak / 2**20,
        "server_mib": own / 2**20,
        "payload": lines[-1]["bytes_up"] + lines[-1]["bytes_down"],
        "loopback": passed / len(later),
        "failures": [row["reason"] for line in lines for row in line["refused"]],
    }


def _seconds(line: dict[str, Any]) -> float:
    """Return a round's seconds without the evaluation."""
    return float(line["seconds"]["train"] + line["seconds"]["aggregate"] + line["seconds"]["checkpoint"])


def _watch(process: subprocess.Popen[bytes], beside: Sequence[int], lines: Path) -> tuple[int, int, int]:
    """Watch a run until it ends. Return the peak memory of all processes, that of the server, and the loopback bytes after the first round."""
    peak = own = start = end = 0
    while process.poll() is None:
        count = lines.read_text().count("\n") if lines.exists() else 0
        passed = psutil.net_io_counters(pernic=True)["lo"].bytes_recv
        start, end = (start or passed, passed) if count else (0, passed)
        peak, own = max(peak, _memory([process.pid, *beside])), max(own, _memory([process.pid], children=False))
        time.sleep(0.1)
    return peak, own, end - start


def _memory(pids: Sequence[int], children: bool = True) -> int:
    total = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(pid)
            for process in [root, *(root.children(recursive=True) if children else [])]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_full_info().pss
    return total


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| engine | clients | MB | s a round (least to most) | first | MiB, all | of it the server | payload MB | loopback MB |"
    lines = [head, "|---" + "|---:" * 8 + "|"]
    for r in rows:
        lines.append(
            f"| {r['engine']} | {r['clients']} | {r['megabytes']:g} | {r['seconds']:.2f} ({r['seconds_least']:.2f} to {r['seconds_most']:.2f}) | "
            f"{r['seconds_first']:.1f} | {r['peak_mib']:,.0f} | {r['server_mib']:,.0f} | {r['payload'] / 1e6:,.0f} | {r['loopback'] / 1e6:,.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", nargs="+", default=["in_process", "ray", "sites"])
    parser.add_argument("--clients", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4, 100])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "engines.json")
    chosen = parser.parse_args()
    found: list[dict[str, Any]] = []
    for asked in ((e, c, m) for e in chosen.engines for m in chosen.megabytes for c in chosen.clients):
        if asked[0] == "sites" and asked[1] * GIB_OF_SITE > psutil.virtual_memory().available / 2**30:
            print(f"{asked}: left out, there is no memory for so many sites", flush=True)
            continue
        found.append(measure(*asked))
        print(table(found[-1:]).splitlines()[-1], flush=True)
        record = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions(), "rows": found}
        chosen.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(found))
