"""Sites with real keys and workers whose messages stay in this process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import Context, Message

from fedmllm.config import Experiment
from fedmllm.flower.carrier import enclosed
from fedmllm.flower.sessions import SESSION, StageFacts, read_stage
from fedmllm.flower.settings import ServerConfig, SiteConfig
from fedmllm.run import federation
from fedmllm.run.resident import Resident
from fedmllm.run.worker import client_app
from fedmllm.sites import keys
from fedmllm.sites.client import SiteWorker
from loopback import LoopbackGrid
from tiny_families import folder_of

RESIDENT = Resident()
"""For the server's side."""
_OWN: dict[str, Resident] = defaultdict(Resident)
"""For sites, whose models are attached at the same time."""
Change = Callable[[StageFacts, Message], Message | None]
"""A change to a message of a session on its way to a site; None loses it."""


class SitesGrid(LoopbackGrid):
    """Carries messages to the workers of sites, in place of a SuperLink.

    Args:
        workers: the workers by site.
        change: a change to the messages of sessions.
    """

    def __init__(self, workers: Mapping[str, SiteWorker], change: Change) -> None:
        self.names, self.change = sorted(workers), change
        self.workers = dict(workers)
        super().__init__(self._answered)  # type: ignore[arg-type]
        self._apps = {name: client_app(lambda name=name: self.workers[name]) for name in self.names}  # type: ignore[misc]

    def _answered(self, message: Message, context: Context) -> Message | None:
        name = self.names[message.metadata.dst_node_id - 1]
        if message.metadata.message_type == SESSION:
            changed = self.change(read_stage(enclosed(message.content))[0], message)
            if changed is None:
                return None
            message = changed
        return self._apps[name](message, context)

    def online(self, names: Sequence[str]) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names, 1) if name in names}


class Sites:
    """A federation's folder with keys, and a worker for each site.

    Args:
        folder: the folder to create.
        count: number of sites.
        settings: additions to ``site.yaml``, by site.
    """

    def __init__(self, folder: Path, count: int, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.folder, self.names = folder, [f"client-{number:02}" for number in range(count)]
        keys.init(folder, "127.0.0.1:8000", self.names)
        for name in self.names:
            own = {"device": "cpu", "model": str(folder_of("llava")), **(settings or {}).get(name, {})}
            path = self.file(name)
            path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **own}))

    def file(self, name: str) -> Path:
        return self.folder / "sites" / name / "site.yaml"

    @property
    def server(self) -> ServerConfig:
        return ServerConfig.load(self.folder / "server" / "server.yaml")

    def worker(self, name: str) -> SiteWorker:
        found = SiteWorker(SiteConfig.load(self.file(name)))
        found.resident = _OWN[name]
        return found

    def experiment(self, rounds: int = 2, **sections: Any) -> Experiment:
        count = len(self.names)
        values: dict[str, Any] = {
            "model": {"name": str(folder_of("llava"))},
            "data": {"dataset": "digits-claims", "num_train": 60, "num_test": 8, "check_images": False},
            "federation": {"num_clients": count, "clients_per_round": count, "num_rounds": rounds, "min_partition_size": 4},
            "training": {"batch_size": 8, "learning_rate": 3e-3},
            "evaluation": {"every": 0, "baselines": []},
            "engine": {"device": "cpu", "parallel_clients": 1, "name": "flower", "server": str(self.folder / "server" / "server.yaml")},
            "failures": {"deadline": 0.5, "below": "skip"},
            "privacy": {"secure_aggregation": True},
        }
        return Experiment.parse({**values, **sections})


@contextmanager
def connected(monkeypatch: pytest.MonkeyPatch, sites: Sites, change: Change = lambda facts, message: message) -> Iterator[SitesGrid]:
    """Let training reach the sites through a grid in this process."""
    grid = SitesGrid({name: sites.worker(name) for name in sites.names}, change)

    @contextmanager
    def serving(link: Any) -> Iterator[SitesGrid]:
        yield grid

    with monkeypatch.context() as patched:
        patched.setattr(federation, "serving", serving)
        patched.setattr(federation, "require_flower", lambda *modules: None)
        yield grid
    for worker in grid.workers.values():
        worker.close()
