"""Compare the usual loop with ours: Transformers' ``Trainer``, one client after another."""

from __future__ import annotations

from dataclasses import replace

from loops import trainer
from loops.workload import Workload

from fedmllm import weights as W
from fedmllm.config import Experiment
from fedmllm.models.lora import read_weights
from fedmllm.training.local import train_locally
from gpu_stages.bench import Bench
from gpu_stages.models import adapted, build
from gpu_stages.training import Case, flops, turns


def beside(bench: Bench) -> None:
    """Time a single client's two steps at 1 x 4 and one step at 16, with the Trainer and with our loop; with picture features and with the vision tower.

    A Trainer takes ten times as long for ten clients as for one. ``distance`` is that of the two results, relative to the distance that the weights moved.
    """
    vlm = adapted(build(bench, "3b"))
    for case in (Case(1, steps=2), Case(1, batch=16, accumulation=1, steps=1)):
        (held,) = case.held(bench, vlm)
        settings = {"training": case.config.model_dump() | {"schedule": "constant"}, "model": {"dtype": "bfloat16"}}
        start, experiment = read_weights(vlm.model), Experiment.parse(settings)
        for features in (True, False):
            model = vlm if features else replace(vlm, features=None)
            # Samples are already encoded.
            work = Workload(experiment, {"client-0": held}, model, start, lambda sample: sample)  # type: ignore[arg-type, dict-item]
            ends = {}
            rows = {"Trainer": lambda work=work: trainer.train(work, "client-0", work.start)}
            if features:
                task, rule = turns(model, [held], case.config)[0]
                rows["one client of ours"] = lambda task=task, rule=rule, case=case: train_locally(vlm, task, rule, case.config).weights
            for name, loop in rows.items():
                seconds = bench.repeated(lambda loop=loop, name=name, ends=ends: ends.update({name: loop()}), 2)  # type: ignore[misc]
                size = {"model": vlm.name, "shape": case.shape if name == "Trainer" and features else None}
                size |= {
                    "samples": len(held),
                    "tokens": sum(len(sample.input_ids) for sample in held),
                    "clients": 1,
                    "flops": flops(vlm, held),
                }
                bench.row(f"{name}, {case.name}{'' if features else ', vision part each time'}", **seconds, **size)
            if features:
                moved, ours = (W.subtract(ends[name], start) for name in ("Trainer", "one client of ours"))
                bench.row(f"the two apart, {case.name}", distance=W.norm(W.subtract(moved, ours)) / W.norm(moved))
