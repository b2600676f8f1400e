"""NVFlare's simulator. The client is the ``Trainer`` of the usual loop, each in its own process with the model resident."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.executor import Executor
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

from loops import trainer
from loops.workload import Done, Go, Workload, workload

served: list[tuple[Workload, Go, Done]] = []
"""The work of the server, which is a fork of this process."""


@functools.cache
def resident(cohort: int, batch_size: int, accumulation: int) -> Workload:
    """Return the client process's own copy of the work; clients share the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // cohort))
    return workload(cohort, batch_size, accumulation)


class Rounds(ModelController):
    """The server, which sends to all clients and averages their replies."""

    def run(self) -> None:
        work, go, done = served[0]
        while go():
            start = time.perf_counter()
            model = FLModel(params={name: tensor.numpy() for name, tensor in work.start.items()})
            received = [reply.params for reply in self.send_model_and_wait(data=model)]
            mean = {name: torch.from_numpy(sum(r[name] for r in received) / len(received)) for name in work.start}
            done(time.perf_counter() - start, mean)


class Client(Executor):
    """A client, which trains on each model that it receives."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.sizes = sizes

    def execute(self, task_name: str, shareable: Any, fl_ctx: Any, abort_signal: Any) -> Any:
        own = resident(*self.sizes)
        name = list(own.clients)[int(fl_ctx.get_identity_name().removeprefix("site-")) - 1]
        received = {key: torch.from_numpy(array) for key, array in FLModelUtils.from_shareable(shareable).params.items()}
        after = trainer.train(own, name, received)
        return FLModelUtils.to_shareable(FLModel(params={key: tensor.numpy() for key, tensor in after.items()}))


def run(work: Workload, go: Go, done: Done, off: str = "") -> None:
    """Run the rounds of a job in the simulator, which keeps the clients' processes only if each client has one."""
    served.append((work, go, done))
    training = work.experiment.training
    sizes = [len(work.clients), training.batch_size, training.accumulation]
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    server = {"workflows": [{"id": "rounds", "path": f"{__name__}.Rounds", "args": {}}]}
    client = {"executors": [{"tasks": ["*"], "executor": {"path": f"{__name__}.Client", "args": {"sizes": sizes}}}]}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "job", "app", "config")
        config.mkdir(parents=True)
        # A job with custom code may name any class.
        config.with_name("custom").mkdir()
        config.with_name("custom").joinpath("own.py").touch()
        for path, content in (
            (config.parents[1] / "meta.json", {"name": "rounds", "deploy_map": {"app": ["@ALL"]}, "min_clients": sizes[0]}),
            (config / "config_fed_server.json", {"format_version": 2, **server}),
            (config / "config_fed_client.json", {"format_version": 2, **client}),
        ):
            path.write_text(json.dumps(content))
        SimulatorRunner(str(config.parents[1]), str(Path(folder, "space")), n_clients=sizes[0], threads=sizes[0]).run()
