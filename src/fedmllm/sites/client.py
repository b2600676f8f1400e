"""A site's worker, which loads the model once and answers the messages that the site's SuperNode receives.

``python -m fedmllm.sites.client site.yaml``. Flower would start a process for every message, which would load the model again and run the code that
came with the run. This process takes the messages instead (``fedmllm.sites.supernode``) and runs only code that is installed at the site.
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
from fedmllm.engine.parties import Parties
from fedmllm.errors import ConfigError, FedMLLMError
from fedmllm.flower.facts import Presence, Scores
from fedmllm.flower.installed import require_flower
from fedmllm.flower.messages import TaskFacts
from fedmllm.flower.sessions import StageFacts
from fedmllm.flower.settings import NAME, SiteConfig
from fedmllm.privacy.ledger import LEDGER, Ledger
from fedmllm.privacy.noise import Noise
from fedmllm.privacy.sample_level import SampleBudget, noise_for
from fedmllm.registry import restrict
from fedmllm.run.open_run import Clients, OpenRun
from fedmllm.run.privacy import nameless, participations
from fedmllm.run.worker import Worker, client_app
from fedmllm.sites.secure import admit, require_secure, site_parties
from fedmllm.sites.supernode import serve
from fedmllm.training.private import PrivateSteps
from fedmllm.types import Answer, ClientFailure, ClientUpdate, Sample

_LOG = logging.getLogger("fedmllm.site")


class SiteWorker(Worker):
    """Trains this site on its own data. It ignores the server's settings for data, paths and devices.

    Args:
        site: the site's settings.
    """

    def __init__(self, site: SiteConfig) -> None:
        super().__init__()
        self._site = site

    def experiment(self, settings: str) -> Experiment:
        """Return the server's experiment with the model, device and data of this site.

        The server's settings cannot make the site read a path, download a file or run code that comes with a model.
        """
        site = self._site
        sent = Experiment.parse({**yaml.safe_load(settings), "plugins": list(site.plugins)})
        if site.model is None and sent.model.name != "nano":
            raise ConfigError(f"the experiment trains {sent.model.name!r}; set model in site.yaml to its folder at this site")
        if site.data is None and not sent.data.dataset.startswith("digits-"):
            raise ConfigError("a site without data of its own supports only trial runs on embedded data; set data in site.yaml")
        model = sent.model.model_copy(update={"name": site.model or "nano", "trust_remote_code": False, "revision": None})
        self._require_reported(sent)
        require_secure(site, sent)
        engine = sent.engine.model_copy(update={"device": site.device, "worker_cpus": float(site.cpus)})
        data = sent.data if site.data is None else self._own_data(site.data, sent)
        return sent.model_copy(update={"model": model, "engine": engine, "data": data})

    def _own_data(self, data: DataConfig, sent: Experiment) -> DataConfig:
        """Return the site's data settings with the server's wording. Samples are held out for validation only if a personalized model is scored here."""
        scored = sent.evaluation.every > 0 and build_algorithm(sent.algorithm).personalized
        share = data.validation_share if scored else 0.0
        return data.model_copy(update={"prompt": sent.data.prompt, "wordings": sent.data.wordings, "validation_share": share})

    def _require_reported(self, sent: Experiment) -> None:
        """Refuse a method that needs a value that this site withholds. No default can replace it."""
        needs, hidden = build_algorithm(sent.algorithm).needs, self._site.withheld
        if "steps" in needs and hidden >= {"metrics", "num_samples"}:
            lacks = "the number of training steps, but this site withholds both metrics and num_samples, which would give it"
        elif "profile" in needs and "profile" in hidden:
            lacks = "the number of samples by modality, but this site withholds its profile"
        else:
            return
        names = ", ".join([sent.algorithm.name, *sent.algorithm.strategy_names])
        raise ConfigError(f"withhold: the method ({names}) needs {lacks}; report it in this run, or do not participate")

    def clients(self, experiment: Experiment) -> Clients:
        """Return the samples of this site as the only client."""
        name = self._site.name
        if self._site.data is not None:
            return {name: self._used(self.resident.dataset(experiment).train)}
        clients = super().clients(experiment)
        if name not in clients:
            raise ConfigError(f"name: {name!r} is not a client of the experiment; a site without data of its own must have the name of one")
        return {name: self._used(clients[name])}

    def _used(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """Return the samples with only the modalities that the site uses."""
        chosen = self._site.modalities
        if not chosen:
            return samples
        kept = (replace(s, content={m: c for m, c in s.content.items() if m in chosen}) for s in samples)
        if not (found := tuple(sample for sample in kept if sample.content)):
            raise ConfigError(f"modalities: no sample has any of {list(chosen)}")
        return found

    def test(self, samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
        """Return test or validation samples with only the modalities that the site uses."""
        return self._used(samples)

    def states(self, facts: TaskFacts) -> ClientStates:
        """Return the store of what this site keeps between rounds, in the site's folder by run and stage."""
        run = str(facts.about["run"])
        if not (NAME.fullmatch(run) and NAME.fullmatch(facts.stage)):
            raise ConfigError(f"the server sent {run!r} as the id of its run, which is not a valid name")
        return ClientStates(self._site.folder / "state" / run / facts.stage)

    def require(self, facts: TaskFacts) -> None:
        """Refuse a task that does not match this site's settings, which the server does not know if the site connected after the run started."""
        site, remedy = self._site, "the server did not know that when the run started; restart the run with --resume to update it"
        if site.rank is not None and facts.rank != site.rank:
            raise ConfigError(f"rank: this site trains at rank {site.rank}, the task has rank {facts.rank}; {remedy}")
        if facts.about["trial"] != (site.data is None):
            raise ConfigError(f"data: this site has {'no data' if site.data is None else 'data'} of its own, {remedy}")

    def parties(self, experiment: Experiment) -> Parties | None:
        """Return this site as the client of secure sessions."""
        return site_parties(self._site, experiment)

    def admit(self, parties: Parties, facts: StageFacts) -> None:
        """Take the keys of all sites from the signed list."""
        admit(self._site, parties, facts)

    def passed_on(self, facts: StageFacts, content: bytes, failure: str = "") -> bytes:
        """Record a message of a session in ``sent.jsonl`` before it is sent."""
        about = {"run": facts.run, "stage": facts.stage, "round": facts.round_num + 1, "step": facts.step}
        self._note({"kind": "session", **about, **({"failure": failure} if failure else {"bytes": len(content)})})
        return content

    @property
    def _hidden(self) -> tuple[str, ...]:
        """What the site does not report. Noise of clients protects from the server only what has noise, so nothing else is reported."""
        noisy = self._run is not None and self._run.experiment.privacy.noise == "clients"
        return ("metrics", "profile", "num_samples") if noisy else tuple(self._site.withheld)

    def private(self, run: OpenRun, facts: TaskFacts) -> PrivateSteps | None:
        """Return how training protects the site's samples: with the site's own limits, and with more noise if the server asks for it.

        Noise always comes from the operating system, even if the server sends a seed.
        """
        limits, config = self._site.privacy, run.experiment.privacy
        if limits is None and config.unit != "sample":
            return None
        size = len(run.samples(facts.client))
        multiplier = max(limits.noise_multiplier if limits else 0.0, _asked(run.experiment, size))
        clip_norm = limits.clip_norm if limits else config.clip_norm
        target, delta = (limits.target_epsilon, limits.target_delta) if limits else (config.target_epsilon, config.target_delta)
        if delta * size >= 1:
            raise ConfigError(f"privacy.target_delta: must be less than 1 / {size}, because this site holds {size} samples; got {delta:g}")
        budget = SampleBudget(Ledger(self._site.folder / LEDGER), multiplier, target, delta)
        return budget.steps(clip_norm, Noise())

    def reported(self, presence: Presence) -> Presence:
        """Return the presence message without the values that the site withholds."""
        hidden = self._hidden
        kept = presence.model_copy(update={"rank": self._site.rank, "trial": self._site.data is None})
        if "profile" in hidden:
            kept = kept.model_copy(update={"profile": {}})
        if "num_samples" in hidden:
            kept = kept.model_copy(update={"num_samples": None})
        self._note({"kind": "presence", **kept.model_dump()})
        return kept

    def sent(self, answer: Answer, facts: TaskFacts) -> Answer:
        """Return the answer without the values that the site withholds, and record it in ``sent.jsonl``."""
        if isinstance(answer, ClientFailure):
            return self._noted(replace(answer, reason=answer.reason.partition(":")[0] + "; see the site's log"), facts)
        hidden = self._site.withheld
        if "metrics" in hidden:
            answer = replace(answer, metrics={name: answer.metrics[name] for name in self._needed_metrics})
        if "profile" in hidden:
            answer = replace(answer, profile={})
        if "num_samples" in hidden:
            answer = replace(answer, num_samples=None)
        return self._noted(answer, facts)

    @property
    def _needed_metrics(self) -> list[str]:
        """Metrics that the site reports even if it withholds metrics: steps, which the server could compute from the number of samples."""
        return ["steps"] if self._run is not None and "steps" in self._run.algorithm.needs else []

    def scored(self, scores: Scores, facts: TaskFacts, model: ServerState) -> Scores | ClientFailure:
        """Return the scores, or a failure if the site withholds metrics. Saves the final model in the site's folder, under the run's id."""
        if not facts.about["tested"]:
            self.save(model, self._site.folder / "adapters" / str(facts.about["run"]))
        record = {"run": facts.about["run"], "round": facts.round_num, "tested": facts.about["tested"]}
        if "metrics" in self._site.withheld:
            return ClientFailure(scores.client, "the site withholds its scores")
        self._note({"kind": "scores", **record, "metrics": scores.metrics})
        return scores

    def failed(self, client: str, error: Exception) -> ClientFailure:
        """Return a failure with the error's type. Only messages of fedmllm's own errors are sent, because others may contain private data."""
        _LOG.error("Task failed", exc_info=error)
        detail = f": {error}" if isinstance(error, FedMLLMError) else "; see the site's log"
        return ClientFailure(client, type(error).__name__ + detail)

    def _noted(self, answer: Answer, facts: TaskFacts) -> Answer:
        record: dict[str, Any] = {"kind": "answer", "run": facts.about["run"], "stage": facts.stage, "round": facts.round_num + 1}
        if isinstance(answer, ClientFailure):
            record |= {"failure": answer.reason}
        else:
            record |= _described(answer)
        self._note(record)
        return answer

    def _note(self, record: dict[str, Any]) -> None:
        """Append a line to ``sent.jsonl``."""
        with (self._site.folder / "sent.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **record}) + "\n")


def _asked(experiment: Experiment, size: int) -> float:
    """Return the noise multiplier that an experiment asks of a client with this many samples; 0 if it does not protect samples."""
    config = experiment.privacy
    if config.unit != "sample":
        return 0.0
    if config.noise_multiplier is not None:
        return config.noise_multiplier
    rounds = participations(nameless(experiment), experiment.seed)
    trainings = 2 if build_algorithm(experiment.algorithm).personalized else 1
    return noise_for(config.target_epsilon or 0.0, config.target_delta, experiment.training, size, rounds * trainings)


def _described(update: ClientUpdate) -> dict[str, Any]:
    """Return the content of an update as plain values, without tensor data."""
    groups = {"update": update.update, **update.extras}
    size = sum(t.nbytes for tensors in groups.values() for t in tensors.values()) if update.num_bytes is None else update.num_bytes
    return {
        **({"held": True} if update.held else {}),
        "tensors": [f"{kind}/{name}" for kind, tensors in groups.items() for name in tensors],
        "bytes": size,
        "num_samples": update.num_samples,
        "metrics": update.metrics,
        "profile": dict(update.profile),
    }


def main() -> None:
    """Run the process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    site = SiteConfig.load(Path(sys.argv[1]))
    require_flower()
    restrict(site.plugins)
    worker = SiteWorker(site)
    serve(site, client_app(lambda: worker))


if __name__ == "__main__":
    main()
