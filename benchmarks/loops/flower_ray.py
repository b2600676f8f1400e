"""Flower's simulation on Ray. The client is the ``Trainer`` of the usual loop, with one core each and the model resident in its actor."""

from __future__ import annotations

import functools
import os
import time

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from loops import trainer
from loops.workload import Done, Go, Workload, workload

for quiet in ("FLWR_DISABLE_UPDATE_CHECK", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"):
    os.environ[quiet] = "1"
for silent in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
    os.environ[silent] = "0"


@functools.cache
def resident(cohort: int, batch_size: int, accumulation: int) -> Workload:
    """Return the actor's own copy of the work."""
    torch.set_num_threads(1)
    return workload(cohort, batch_size, accumulation)


def run(work: Workload, go: Go, done: Done, off: str = "") -> None:
    """Run rounds of a server that sends to all nodes and averages the replies."""
    training = work.experiment.training
    sizes = (len(work.clients), training.batch_size, training.accumulation)
    client_app, server_app = ClientApp(), ServerApp()

    @client_app.train()
    def fit(message: Message, context: Context) -> Message:
        own = resident(*sizes)
        name = list(own.clients)[int(context.node_config["partition-id"])]
        after = trainer.train(own, name, message.content["weights"].to_torch_state_dict())
        return Message(RecordDict({"weights": ArrayRecord(after)}), reply_to=message)

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        while len(nodes := list(grid.get_node_ids())) < sizes[0]:
            time.sleep(0.1)
        while go():
            start = time.perf_counter()
            content = RecordDict({"weights": ArrayRecord(work.start)})
            replies = list(grid.send_and_receive([Message(content, dst_node_id=node, message_type="train") for node in nodes]))
            received = [reply.content["weights"].to_torch_state_dict() for reply in replies]
            mean = {name: sum(r[name] for r in received) / len(received) for name in work.start}
            done(time.perf_counter() - start, mean)

    cores = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": os.cpu_count(), "include_dashboard": False}}
    run_simulation(server_app, client_app, sizes[0], backend_config=cores)
