"""Every method in four scenarios on two embedded tasks, three seeds: one line of JSON per cell, resumable.

    python benchmarks/methods.py [--seeds 0 1 2] [--shard 0/2] [--only fedavg yoco] [--twelve] [--no-baselines] [--output benchmarks/results/methods.jsonl]

Cells that are in the file already are skipped. The cells of ``fedavg`` also train the baselines, unless ``--no-baselines`` says not to.
``--twelve`` takes the benchmark's twelve settings rather than one of each kind. ``--table`` prints mean and standard error over seeds instead.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmllm import Experiment, train
from fedmllm.algorithms import ALGORITHMS
from fedmllm.benchmark.resident import Resident
from fedmllm.evaluation.metrics import error_over_models

SCENARIOS = ("aligned-0.5", "missing-0.4", "cross-5:5", "hybrid-0.7")
TWELVE = (
    *("aligned-5.0", "aligned-1.0", "aligned-0.5"),
    *("missing-0.3", "missing-0.4", "missing-0.5"),
    *("cross-3:7", "cross-5:5", "cross-7:3"),
    *("hybrid-0.8", "hybrid-0.7", "hybrid-0.6"),
)
TASKS: dict[str, dict[str, Any]] = {
    "digits-claims": {"num_train": 300, "num_test": 400, "num_rounds": 10},
    "digits-triage": {"num_train": 400, "num_test": 300, "num_rounds": 8},
}
BASELINES = ("zero_shot", "local", "centralized")
BASELINE_SCORES = ("zero_shot", "local_mean", "centralized", "ceiling")
COHORT, CLIENTS = 5, 10


def method(name: str = "fedavg", *strategies: str | dict[str, Any], **parameters: float) -> dict[str, Any]:
    """A row's section ``algorithm``."""
    return {"algorithm": {"name": name, "parameters": parameters, "strategies": strategies}}


def strategy(name: str, **parameters: float) -> dict[str, Any]:
    """A strategy with parameters."""
    return {"name": name, "parameters": parameters}


ROWS: dict[str, dict[str, Any]] = {
    **{name: method(name) for name in ("fedavg", *sorted(ALGORITHMS.keys() - {"fedavg", "fedit", "yoco"}))},
    "fedavgm, beta1 0.5": method("fedavgm", beta1=0.5),
    "fedavgm, rate 0.3": method("fedavgm", server_learning_rate=0.3),
    "fedadagrad, rate 0.03": method("fedadagrad", server_learning_rate=0.03),
    "fedadam, rate 0.01": method("fedadam", server_learning_rate=0.01),
    "fedyogi, rate 0.01": method("fedyogi", server_learning_rate=0.01),
    "FedMLLM(fedavg)": method("FedMLLM(fedavg)"),
    "FedMLLM(fedyogi), rate 0.01": method("FedMLLM(fedyogi)", server_learning_rate=0.01),
    "fedavg, specific prompt": {"data": {"prompt": "specific"}},
    "fedavg + feature_alignment": method("fedavg", "feature_alignment"),
    "fedavg + modality_coverage": method("fedavg", "modality_coverage"),
    "fedavg + label_calibration": method("fedavg", "label_calibration"),
    "fedavg, one shot": {"one_shot": 10},
    "fedavg, one shot of 5 epochs": {"one_shot": 5},
    "yoco": {"one_shot": 10, **method("yoco")},
    "yoco, reference": {"one_shot": 10, **method("yoco", reference=True)},
    **{f"fedavg, {name}": {"compression": {"name": name}} for name in ("bfloat16", "int8", "int4", "top_k")},
}
"""``fedit`` is left out: with adapters it is ``fedavg``. The parts of ``fedmllm`` alone are "flexlora" and label_calibration.
One shot is one round of all clients with so many epochs; in the rounds of the others a sample is visited five or four times on average."""


CALIBRATED = "label_calibration"
CANDIDATES: dict[str, dict[str, Any]] = {
    "fedmllm + modality_coverage": method("fedmllm", "modality_coverage"),
    "fedmllm + feature_alignment": method("fedmllm", "feature_alignment"),
    "fedmllm, calibration 0.5": method("fedmllm", calibration=0.5),
    "fednova + label_calibration": method("fednova", CALIBRATED),
    "fedavgm, beta1 0, rate 1.5 + label_calibration": method("fedavgm", CALIBRATED, beta1=0.0, server_learning_rate=1.5),
    "fedavgm, beta1 0, rate 2 + label_calibration": method("fedavgm", CALIBRATED, beta1=0.0, server_learning_rate=2.0),
    "fedavgm, beta1 0.5 + label_calibration": method("fedavgm", CALIBRATED, beta1=0.5),
    "fedavgm, beta1 0.7 + label_calibration": method("fedavgm", CALIBRATED, beta1=0.7),
    "fedavgm, beta1 0.5, rate 1.5 + label_calibration": method("fedavgm", CALIBRATED, beta1=0.5, server_learning_rate=1.5),
    "fedavgm, beta1 0.5 + label_calibration 1.5": method("fedavgm", strategy(CALIBRATED, strength=1.5), beta1=0.5),
    "fedavgm, beta1 0.5 + label_calibration + modality_coverage": method("fedavgm", CALIBRATED, "modality_coverage", beta1=0.5),
}
"""What ``fedmllm`` was chosen from, with some of the rows above, on seeds that the table does not use."""


def cells(seeds: list[int], only: list[str], scenarios: Sequence[str]) -> Iterator[tuple[str, str, str, int]]:
    """(task, scenario, row, seed), seed by seed."""
    for seed in seeds:
        for row in only or ROWS:
            for task in TASKS:
                for scenario in scenarios:
                    yield task, scenario, row, seed


def experiment(task: str, scenario: str, row: str, seed: int, baselines: Sequence[str] = ()) -> Experiment:
    """A cell's settings."""
    extra, size = dict((ROWS | CANDIDATES)[row]), TASKS[task]
    one_shot = extra.pop("one_shot", 0)
    sections: dict[str, dict[str, Any]] = {
        "data": {"dataset": task, "num_train": size["num_train"], "num_test": size["num_test"]},
        "federation": {
            "num_clients": CLIENTS,
            "clients_per_round": CLIENTS if one_shot else COHORT,
            "num_rounds": 1 if one_shot else size["num_rounds"],
            "scenario": scenario,
        },
        "algorithm": {},
        "training": {"batch_size": 8, "learning_rate": 6e-3, "local_epochs": one_shot or 1},
        "evaluation": {"every": 0, "baselines": baselines},
        "engine": {"device": "cpu"},
    }
    for name, values in extra.items():
        sections[name] = {**sections.get(name, {}), **values}
    return Experiment.parse({**sections, "seed": seed})


def measure(task: str, scenario: str, row: str, seed: int, resident: Resident, baselines: Sequence[str] = ()) -> dict[str, Any]:
    """Train one cell in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(experiment(task, scenario, row, seed, baselines), Path(folder) / "run", resident=resident)
        rounds = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    own = [line for line in rounds if line["stage"] == "federated"]
    return {
        "task": task,
        "scenario": scenario,
        "row": row,
        "seed": seed,
        "metric": result.metric,
        "scores": {name: score for name, score in result.scores.items() if score is not None},
        "standard_error": result.standard_errors["federated"],
        "bytes_up": result.bytes_up,
        "bytes_down": result.bytes_down,
        "bytes_held": max(line["bytes_held"] for line in own),
        "server_seconds": sum(line["seconds"]["aggregate"] for line in own),
        "seconds": result.seconds_by_stage["federated"],
        "machine": f"{platform.machine()}, CPU",
        "versions": result.versions,
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The cells measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def run(options: argparse.Namespace) -> None:
    """Measure what is missing of this shard."""
    index, count = map(int, options.shard.split("/"))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    resident = Resident()
    done = {(line["task"], line["scenario"], line["row"], line["seed"]) for line in read(options.output)}
    for position, cell in enumerate(cells(options.seeds, options.only, options.scenarios)):
        if position % count != index or cell in done:
            continue
        line = measure(*cell, resident, BASELINES if cell[2] == "fedavg" and options.baselines else ())
        with options.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(*cell, f"{line['scores']['federated']:.3f}", f"{line['seconds']:.0f} s", flush=True)


Group = tuple[str, str]
"""A task and a kind of scenario: one column."""


def table(lines: list[dict[str, Any]], scenarios: Sequence[str]) -> str:
    """In percent, mean and standard error over seeds of the mean over a kind's scenarios; last all of them, and above FedAvg seed by seed."""
    kinds = dict.fromkeys(scenario.split("-")[0] for scenario in scenarios)
    groups = [(task, kind) for task in TASKS for kind in kinds]
    titles = [f"{task.removeprefix('digits-')} {kind}" for task, kind in groups]
    rows = [f"| method | {' | '.join(titles)} | mean | above fedavg | MB up | down |", "|---" * (len(groups) + 5) + "|"]
    everyone = _by_seed(lines, groups, scenarios, "fedavg", "federated")
    for name in (*BASELINE_SCORES, *ROWS, *CANDIDATES):
        key, row = (name, "fedavg") if name in BASELINE_SCORES else ("federated", name)
        scores = _by_seed(lines, groups, scenarios, row, key)
        if any(scores.values()):
            texts = [cell_text([by_group[group] for by_group in scores.values() if group in by_group]) for group in groups]
            whole = {seed: statistics.mean(by_group.values()) for seed, by_group in scores.items() if len(by_group) == len(groups)}
            less = [
                mean - statistics.mean(everyone[seed].values())
                for seed, mean in whole.items()
                if len(everyone.get(seed, {})) == len(groups)
            ]
            texts += [cell_text(list(whole.values())), "" if row == name == "fedavg" else cell_text(less)]
            texts += ["", ""] if key != "federated" else [_megabytes(lines, scenarios, row, way) for way in ("bytes_up", "bytes_down")]
            rows.append(f"| {name} | {' | '.join(texts)} |")
    return "\n".join(rows)


def _megabytes(lines: list[dict[str, Any]], scenarios: Sequence[str], row: str, way: str) -> str:
    """A run's mean."""
    return f"{statistics.mean(line[way] for line in lines if line['row'] == row and line['scenario'] in scenarios) / 1e6:.3g}"


def _by_seed(
    lines: list[dict[str, Any]], groups: Sequence[Group], scenarios: Sequence[str], row: str, key: str
) -> dict[int, dict[Group, float]]:
    """A row's scores by seed and column, of the columns whose scenarios are all measured."""
    found: dict[int, dict[Group, dict[str, float]]] = {}
    for line in lines:
        if line["row"] == row and line["scenario"] in scenarios and key in line["scores"]:
            group = (line["task"], line["scenario"].split("-")[0])
            found.setdefault(line["seed"], {}).setdefault(group, {})[line["scenario"]] = line["scores"][key]
    size = {kind: sum(scenario.startswith(kind) for scenario in scenarios) for _, kind in groups}
    return {
        seed: {group: statistics.mean(scores.values()) for group, scores in by_group.items() if len(scores) == size[group[1]]}
        for seed, by_group in found.items()
    }


def cell_text(scores: list[float]) -> str:
    """``81.2 (0.9)``: mean and standard error over seeds."""
    if not scores:
        return ""
    error = error_over_models(scores)
    return f"{100 * statistics.mean(scores):.1f}" + ("" if error is None else f" ({100 * error:.1f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--only", nargs="+", choices=[*ROWS, *CANDIDATES], default=[])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "methods.jsonl")
    parser.add_argument("--twelve", dest="scenarios", action="store_const", const=TWELVE, default=SCENARIOS)
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--table", action="store_true")
    chosen = parser.parse_args()
    if chosen.table:
        print(table([line for line in read(chosen.output) if line["seed"] in chosen.seeds], chosen.scenarios))
    else:
        run(chosen)
