"""A site's worker: it loads the model once and answers what the site's SuperNode receives. ``python -m fedmllm.sites.client site.yaml``.

Flower would start a process for every message, which would load the model anew, and run the code that came with the run. This process takes the
messages instead (``fedmllm.sites.supernode``), and runs what is installed here.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from fedmllm.algorithms import ServerState, build_algorithm
from fedmllm.config import Experiment
from fedmllm.data.settings import DataConfig
from fedmllm.engine.checkpoint import ClientStates
from fedmllm.errors import ConfigError, FedMLLMError
from fedmllm.flower.facts import Presence, Scores
from fedmllm.flower.installed import require_flower
from fedmllm.flower.messages import TaskFacts
from fedmllm.flower.settings import NAME, SiteConfig
from fedmllm.registry import restrict
from fedmllm.run.worker import Clients, Worker, client_app
from fedmllm.sites.supernode import serve
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Sample

_LOG = logging.getLogger("fedmllm.site")


class SiteWorker(Worker):
    """Trains this site on its own data, whatever the server's settings say about data, paths and devices.

    Args:
        site: its settings.
    """

    def __init__(self, site: SiteConfig) -> None:
        super().__init__()
        self._site = site

    def experiment(self, settings: str) -> Experiment:
        """The server's, with model, device and data of this site. Nothing of it leads to a path, a download or code that comes with a model."""
        site = self._site
        told = Experiment.parse({**yaml.safe_load(settings), "plugins": list(site.plugins)})
        if site.model is None and told.model.name != "nano":
            raise ConfigError(f"the experiment trains {told.model.name!r}; set model in site.yaml to its folder at this site")
        if site.data is None and not told.data.dataset.startswith("digits-"):
            raise ConfigError("a site without data of its own tries out embedded data only; set data in site.yaml")
        model = told.model.model_copy(update={"name": site.model or "nano", "trust_remote_code": False, "revision": None})
        self._require_told(told)
        engine = told.engine.model_copy(update={"device": site.device, "worker_cpus": float(site.cpus)})
        data = told.data if site.data is None else self._own_data(site.data, told)
        return told.model_copy(update={"model": model, "engine": engine, "data": data})

    def _own_data(self, data: DataConfig, told: Experiment) -> DataConfig:
        """In the server's words. Nothing is held out where no model is scored here: only one that stays at its site is."""
        scored = told.evaluation.every > 0 and build_algorithm(told.algorithm).personalized
        share = data.validation_share if scored else 0.0
        return data.model_copy(update={"prompt": told.data.prompt, "wordings": told.data.wordings, "validation_share": share})

    def _require_told(self, told: Experiment) -> None:
        """Refuse a method that needs what is withheld: no number stands for it."""
        needs, hidden = build_algorithm(told.algorithm).needs, set(self._site.withhold)
        if "steps" in needs and hidden >= {"metrics", "num_samples"}:
            lacks = "the number of this site's steps, which withholds both metrics and num_samples, from which they follow"
        elif "profile" in needs and "profile" in hidden:
            lacks = "this site's samples by modality, which withholds its profile"
        else:
            return
        names = ", ".join([told.algorithm.name, *told.algorithm.strategy_names])
        raise ConfigError(f"withhold: the method ({names}) needs {lacks}; tell them in this run, or take no part in it")

    def clients(self, experiment: Experiment) -> Clients:
        """One: this site."""
        name = self._site.name
        if self._site.data is not None:
            return {name: self._used(self.resident.dataset(experiment).train)}
        clients = super().clients(experiment)
        if name not in clients:
            raise ConfigError(f"a site without data of its own is named like one of the experiment's clients; {name!r} is none of them")
        return {name: self._used(clients[name])}

    def _used(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """With the modalities that are used here."""
        chosen = self._site.modalities
        if not chosen:
            return samples
        kept = (replace(s, content={m: c for m, c in s.content.items() if m in chosen}) for s in samples)
        if not (found := tuple(sample for sample in kept if sample.content)):
            raise ConfigError(f"modalities: no sample has any of {list(chosen)}")
        return found

    def test(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """With the modalities that are used here."""
        return self._used(samples)

    def states(self, facts: TaskFacts) -> ClientStates:
        """In the site's folder, by run and stage."""
        run = str(facts.about["run"])
        if not (NAME.fullmatch(run) and NAME.fullmatch(facts.stage)):
            raise ConfigError(f"the server's name for its run, {run!r}, is no plain name")
        return ClientStates(self._site.folder / "state" / run / facts.stage)

    def require(self, facts: TaskFacts) -> None:
        """One that was not there when the run began has not told the server what it is."""
        site, told = self._site, "the server was not told so when the run began; it will be when it is started anew, with --resume"
        if site.rank is not None and facts.rank != site.rank:
            raise ConfigError(f"rank: this site trains at rank {site.rank}, the task is of rank {facts.rank}; {told}")
        if facts.about["trial"] != (site.data is None):
            raise ConfigError(f"data: this site {'only tries out' if site.data is None else 'has data of its own'}, {told}")

    def told(self, presence: Presence) -> Presence:
        """Without what is withheld."""
        hidden = self._site.withhold
        kept = presence.model_copy(update={"rank": self._site.rank, "trial": self._site.data is None})
        if "profile" in hidden:
            kept = kept.model_copy(update={"profile": {}})
        if "num_samples" in hidden:
            kept = kept.model_copy(update={"num_samples": None})
        self._note({"kind": "presence", **kept.model_dump()})
        return kept

    def sent(self, answer: Answer, facts: TaskFacts) -> Answer:
        """Without what is withheld; what is sent is noted."""
        if isinstance(answer, ClientFailure):
            return self._noted(replace(answer, reason=answer.reason.partition(":")[0] + "; more is in the site's log"), facts)
        hidden = self._site.withhold
        if "metrics" in hidden:
            answer = replace(answer, metrics={name: answer.metrics[name] for name in self._needed_metrics})
        if "profile" in hidden:
            answer = replace(answer, profile={})
        if "num_samples" in hidden:
            answer = replace(answer, num_samples=None)
        return self._noted(answer, facts)

    @property
    def _needed_metrics(self) -> list[str]:
        """What of the metrics is told though they are withheld: steps, which the server knows how to count from the number of samples."""
        return ["steps"] if self._run is not None and "steps" in self._run.algorithm.needs else []

    def scored(self, scores: Scores, facts: TaskFacts, model: ServerState) -> Scores | ClientFailure:
        """Nothing if metrics are withheld. The model is left in the site's folder, under the run's name."""
        if not facts.about["tested"]:
            self.save(model, self._site.folder / "adapters" / str(facts.about["run"]))
        record = {"run": facts.about["run"], "round": facts.round_num, "tested": facts.about["tested"]}
        if "metrics" in self._site.withhold:
            return ClientFailure(scores.client, "it does not tell its scores")
        self._note({"kind": "scores", **record, "metrics": scores.metrics})
        return scores

    def failed(self, client: str, error: Exception) -> ClientFailure:
        """Its kind, and the words of errors of our own; others' may hold what is private, and stay here."""
        _LOG.error("failed", exc_info=error)
        words = f": {error}" if isinstance(error, FedMLLMError) else "; more is in the site's log"
        return ClientFailure(client, type(error).__name__ + words)

    def _noted(self, answer: Answer, facts: TaskFacts) -> Answer:
        record: dict[str, Any] = {"kind": "answer", "run": facts.about["run"], "stage": facts.stage, "round": facts.round_num + 1}
        if isinstance(answer, ClientFailure):
            record |= {"failure": answer.reason}
        else:
            record |= _described(answer)
        self._note(record)
        return answer

    def _note(self, record: dict[str, Any]) -> None:
        """A line of ``sent.jsonl``."""
        with (self._site.folder / "sent.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}) + "\n")


def _described(update: ClientUpdate) -> dict[str, Any]:
    """What an update holds, in words and numbers."""
    groups = {"update": update.update, **update.extras}
    size = sum(t.nbytes for tensors in groups.values() for t in tensors.values()) if update.num_bytes is None else update.num_bytes
    return {
        "tensors": [f"{kind}/{name}" for kind, tensors in groups.items() for name in tensors],
        "bytes": size,
        "num_samples": update.num_samples,
        "metrics": update.metrics,
        "profile": dict(update.profile),
    }


def main() -> None:
    """The process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    site = SiteConfig.load(Path(sys.argv[1]))
    require_flower()
    restrict(site.plugins)
    worker = SiteWorker(site)
    serve(site, client_app(lambda: worker))


if __name__ == "__main__":
    main()
