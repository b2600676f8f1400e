"""A sweep folder written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedmllm.evaluation.predictions import Answered, to_record
from run_folders import Folder, round_line

METHODS = {"FedAvg": 0.5, "FedProx_1 & co": 0.6, "<b>ours</b>": 0.7}


SCENARIOS = ("aligned", "missing-0.4")


SEEDS = (0, 1)


def score_of(method: str, scenario: str, seed: int) -> float:
    return METHODS[method] + 0.05 * (scenario == "aligned") + 0.02 * seed


def answers(score: float, count: int = 100) -> Answered:
    """Answers with the right ones first."""
    guess = (np.arange(count) < round(score * count)).astype(float)
    return Answered("accuracy", ("accuracy",), np.zeros(count, int), np.ones(count, int), guess)


def write_sweep(folder: Path) -> Path:
    """Three methods, two scenarios, two seeds, and baselines for the first method. One cell is missing and one is unfinished."""
    (folder / "cells").mkdir(parents=True)
    names = {"methods": list(METHODS), "models": ["nano"], "datasets": ["cats"], "scenarios": list(SCENARIOS), "seeds": list(SEEDS)}
    names["published"] = {"cats": {"FedAvg": {"aligned": 71.0, "missing-0.4": 60.0}}}  # type: ignore[assignment]
    (folder / "grid.json").write_text(json.dumps(names))
    for m, method in enumerate(METHODS):
        for scenario in SCENARIOS:
            for seed in SEEDS:
                if (method, scenario, seed) == ("<b>ours</b>", "aligned", 1):
                    continue
                key, score = f"{m}-{scenario}-{seed}", score_of(method, scenario, seed)
                labels = {"model": "nano", "dataset": "cats", "seed": seed, "scenario": scenario, "method": method, "code": "abc"}
                (folder / "cells" / f"{key}.json").write_text(json.dumps(labels))
                run = Folder(folder / "cells" / key)
                run.lines = [round_line("federated", 1, score / 2), round_line("federated", 2, score)]
                assert run.result is not None
                if m:
                    run.result["scores"] |= dict.fromkeys(("zero_shot", "local_mean", "centralized"))
                run.result["scores"]["federated"] = score
                run.result["bytes_up"] = 10 ** (6 + m)
                if (method, scenario, seed) == ("FedProx_1 & co", "aligned", 1):
                    run.result = None
                run.write()
                (folder / "cells" / key / "predictions.json").write_text(json.dumps(to_record([answers(score)])))
    return folder


def changed(sweep: Path, method: str, config: str = "", **values: Any) -> None:
    """Change a method's results and settings in all its cells."""
    for names in (sweep / "cells").glob("*.json"):
        folder = names.with_suffix("")
        if json.loads(names.read_text())["method"] == method and (folder / "result.json").exists():
            result = json.loads((folder / "result.json").read_text()) | values
            (folder / "result.json").write_text(json.dumps(result))
            (folder / "config.yaml").write_text((folder / "config.yaml").read_text() + config)
