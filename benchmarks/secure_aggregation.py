"""Measure a session of secure aggregation: all clients and the server in one process, without a network and without writing messages.

    python benchmarks/secure_aggregation.py [--clients 3 10 50] [--megabytes 4 100] [--repeats 5] [--output benchmarks/results/secure_aggregation.json]

Each row is a process of its own. Its seconds are the sum of the server's and all clients' work, as if they took turns on this machine; clients' seconds are
those of the median client. Creating the vectors and checking the sum are not timed. With a tenth of the clients missing, they send shares but no vector, which
is the most expensive moment for the server. Bytes are those of the written messages of one client. Rows of 50 clients with 100 MB are repeated three times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric import ec

from fedmllm.privacy.secagg.messages import STAGES, RoundId, Vector, write
from fedmllm.privacy.secagg.party import Party
from fedmllm.privacy.secagg.policy import Policy
from fedmllm.privacy.secagg.server import Server
from fedmllm.privacy.secagg.simulate import UsedInMemory
from fedmllm.run.results import versions

SERVER = "server"


class Clock:
    """Seconds by participant."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begun


class Sizes:
    """Bytes of one client's messages by direction."""

    def __init__(self, client: str) -> None:
        self.client, self.down, self.up = client, 0, 0

    def add(self, name: str, down: Any, up: Any) -> None:
        if name == self.client:
            self.down += len(write(down))
            self.up += 0 if up is None else len(write(up))


def session(count: int, base: Vector, missing: int, sizes: Sizes | None) -> Clock:
    """Run a session and return its seconds. The vector of client k is the base plus k."""
    names, clock, round_id = [f"client-{k:02d}" for k in range(count)], Clock(), RoundId("benchmark", "federated", 0)
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    sites = {name: key.public_key() for name, key in keys.items()}
    parties = {}
    for name in names:
        with clock.of(name):
            parties[name] = Party(name, keys[name], sites, round_id, UsedInMemory(), Policy())
    with clock.of(SERVER):
        server = Server(round_id, dict.fromkeys(names, 1 / count), sites, len(base), 2)
    gone = set(names[count - missing :])
    for stage in STAGES:
        with clock.of(SERVER):
            messages: dict[str, Any] = server.begin(stage)
        for name, message in messages.items():
            if stage == "masked" and name in gone:
                continue
            arguments = [message, base + np.uint32(names.index(name))] if stage == "masked" else [message]
            with clock.of(name):
                answer = getattr(parties[name], stage)(*arguments)
            with clock.of(SERVER):
                server.receive(name, answer)
            if sizes is not None:
                sizes.add(name, message, answer)
    with clock.of(SERVER):
        total = server.total()
    left = count - missing
    if not (total.vector == base * np.uint32(left) + np.uint32(left * (left - 1) // 2)).all():
        raise RuntimeError("the sum is wrong")
    return clock


def measure(count: int, megabytes: float, missing: int, repeats: int) -> dict[str, Any]:
    """Return a row."""
    base = np.random.default_rng(0).integers(0, 2**32, round(megabytes * 1e6 / 4), dtype=np.uint32)
    sizes = Sizes("client-00")
    session(count, base[:1000], missing, None)
    clocks = [session(count, base, missing, sizes if i == 0 else None).seconds for i in range(repeats)]
    totals = [sum(clock.values()) for clock in clocks]
    clients = [statistics.median(spent for name, spent in clock.items() if name != SERVER) for clock in clocks]
    return {
        "clients": count,
        "megabytes": megabytes,
        "missing": missing,
        "repeats": repeats,
        "seconds": statistics.median(totals),
        "seconds_least": min(totals),
        "seconds_most": max(totals),
        "client_seconds": statistics.median(clients),
        "server_seconds": statistics.median(clock[SERVER] for clock in clocks),
        "bytes_up": sizes.up,
        "bytes_down": sizes.down,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = "| clients | missing | MB | s, all (least to most) | a client | the server | kB up, without the vector | kB down | MiB, all |"
    lines = [head, "|---:" * 9 + "|"]
    for r in rows:
        lines.append(
            f"| {r['clients']} | {r['missing']} | {r['megabytes']:g} | {r['seconds']:.2f} ({r['seconds_least']:.2f} to {r['seconds_most']:.2f}) | "
            f"{r['client_seconds']:.3f} | {r['server_seconds']:.3f} | {r['bytes_up'] / 1e3 - r['megabytes'] * 1e3:.1f} | "
            f"{r['bytes_down'] / 1e3:.1f} | {r['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """Describe the processor."""
    path = Path("/proc/cpuinfo")
    models = (
        [line.partition(":")[2].strip() for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    )
    return f"{models[0] if models else platform.processor()}, {platform.machine()}, {os.cpu_count()} cores"


def main(chosen: argparse.Namespace) -> None:
    found: list[dict[str, Any]] = []
    asked = [(n, m, missing) for m in chosen.megabytes for n in chosen.clients for missing in sorted({0, n // 10})]
    record = {
        "machine": machine(),
        "command": f"python benchmarks/secure_aggregation.py {' '.join(sys.argv[1:])}".rstrip(),
        "threads": torch.get_num_threads(),
        "versions": {**versions(), "cryptography": version("cryptography")},
        "rows": found,
    }
    for count, megabytes, missing in asked:
        repeats = chosen.repeats if count * megabytes < 2000 else min(chosen.repeats, 3)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            found.append(pool.submit(measure, count, megabytes, missing, repeats).result())
        print(table(found[-1:]).splitlines()[-1], flush=True)
        chosen.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--clients", type=int, nargs="+", default=[3, 10, 50])
    parser.add_argument("--megabytes", type=float, nargs="+", default=[4, 100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "secure_aggregation.json")
    main(parser.parse_args())
