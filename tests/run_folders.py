"""Run folders written by hand, and the parts of the pages made from them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fedmllm.reports.run_report import write_report
from fedmllm.sweeps.grid import Cell, Grid, cells

SMALL: dict[str, Any] = {
    "base": {
        "data": {"num_train": 24, "num_test": 8},
        "federation": {"num_clients": 2, "clients_per_round": 2, "num_rounds": 2, "min_partition_size": 4},
        "evaluation": {"every": 0},
        "engine": {"device": "cpu"},
    },
    "methods": ["fedavg", "fedprox"],
    "scenarios": ["aligned"],
    "datasets": {"claims": {"data": {"dataset": "digits-claims"}}},
    "seeds": [0],
    "baselines": ["zero_shot"],
}
"""A grid that trains in seconds."""


def small(**changes: Any) -> list[Cell]:
    """The cells of that grid with changes."""
    return cells(Grid.model_validate(SMALL | changes))


VOID = {"meta", "br", "link", "img", "input", "hr"}


def details(score: float, failures: int = 3) -> dict[str, float]:
    partial = {"accuracy_open": 0.3456, "accuracy_closed": 0.7891}
    return {"score": score, "standard_error": 0.0194, "num_samples": 400, "failures": failures} | partial


def round_line(stage: str, number: int, score: float | None = None, **changes: Any) -> dict[str, Any]:
    seconds = {"train": 2.0, "aggregate": 0.25, "evaluate": 1.0, "checkpoint": 0.5}
    return {
        "stage": stage, "round": number, "clients": ["client-00", "client-01"], "num_samples": 60, "learning_rate": 1e-3,
        "loss": 2 / number, "score": score, "scores": details(score) if score is not None else None,
        "bytes_up": 1_000_000, "bytes_down": 2_000_000, "seconds": seconds, "refused": [],
    } | changes  # fmt: skip


class Folder:
    """A run folder whose files a test can change before they are written."""

    def __init__(self, path: Path, num_clients: int = 4, num_rounds: int = 6, labels: Sequence[str] = ("cat", "dog")) -> None:
        self.path, self.names = path, [f"client-{i:02d}" for i in range(num_clients)]
        self.config = "seed: 7  # <kept> as it is\n"
        counts = [
            {"num_samples": 10 + i, "labels": dict.fromkeys(labels, 1 + i % 3), "modalities": {"image+text": 6, "text": 4 + i}}
            for i in range(num_clients)
        ]
        self.manifest: dict[str, Any] = {
            "dataset": "digits-vqa", "scenario": "missing-0.4", "seed": 7, "metric": "accuracy", "notes": ["12 rows had no image"],
            "clients": [{"id": name, **count, "samples": []} for name, count in zip(self.names, counts, strict=True)],
            "test": counts[0], "dropped": 5,
        }  # fmt: skip
        zero = {"stage": "zero_shot", "round": 0, "score": 0.1111, "scores": details(0.1111), "seconds": {"evaluate": 1.0}}
        federated = [round_line("federated", n, 0.5 + n / 100 if n % 2 == 0 or n == num_rounds else None) for n in range(1, num_rounds + 1)]
        local = [round_line(f"local-{name}", 1, 0.3 + i / 1000) for i, name in enumerate(self.names)]
        self.lines: list[dict[str, Any]] = [zero, *federated, round_line("centralized", 1, 0.777), *local]
        self.result: dict[str, Any] | None = {
            "experiment": "vqa-study", "metric": "accuracy", "majority": 0.2468, "seed": 7, "seconds": 75.0, "num_rounds": num_rounds,
            "scores": {"zero_shot": 0.1111, "local_mean": 0.3333, "federated": 0.5678, "centralized": 0.7777, "ceiling": 0.9321},
            "standard_errors": {"zero_shot": 0.0123, "local_mean": 0.0234, "federated": 0.0344, "centralized": 0.0456, "ceiling": None},
            "details": {"zero_shot": details(0.1111, 11), "federated": details(0.5678, 22), "centralized": details(0.7777, 33)},
            "local": {name: 0.3 + i / 1000 for i, name in enumerate(self.names)}, "bytes_up": 6_000_000, "bytes_down": 12_000_000,
            "seconds_by_stage": {"zero_shot": 1.0, "federated": 60.0, "centralized": 4.0} | {f"local-{name}": 1.0 for name in self.names},
            "versions": {"python": "3.11.7", "torch": "2.13.0"}, "num_clients": num_clients, "clients_per_round": 2,
            "trainable_parameters": 65_536, "algorithm": "fedavg", "strategies": ["agnostic_prompt"], "model": "nano",
        }  # fmt: skip

    def write(self) -> Path:
        """Write the files and return the folder."""
        self.path.mkdir(exist_ok=True)
        (self.path / "config.yaml").write_text(self.config)
        (self.path / "manifest.json").write_text(json.dumps(self.manifest))
        (self.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        if self.result is not None:
            (self.path / "result.json").write_text(json.dumps(self.result))
        return self.path

    def report(self) -> str:
        """Write the files and the report, and return its text."""
        path = write_report(self.write())
        assert path == self.path / "report.html"
        return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """A page's tags, attributes and visible text. A tag that is not closed is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data.replace("\u00a0", " "))

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def table_rows(html: str) -> dict[str, list[str]]:
    """The cells of every table row, by the row's first cell."""
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", html, re.DOTALL)]
    plain = [[re.sub(r"<[^>]*>", "", cell).replace("\u00a0", " ") for cell in row] for row in rows]
    return {row[0]: row[1:] for row in plain}
