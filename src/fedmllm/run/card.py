"""Model cards of adapters and merged models: data, training, scores, privacy, and how to load them."""

from __future__ import annotations

from fedmllm.config import Experiment
from fedmllm.format import human_bytes
from fedmllm.privacy.statement import UNPROTECTED, PrivacyStatement, SecureStatement
from fedmllm.run.results import SCORES, RunResult

CARD = """---
base_model: {model}
library_name: peft
pipeline_tag: image-text-to-text
tags:
- lora
- federated-learning
---

# {title}

A LoRA adapter of `{model}`, fine-tuned across clients with fedmllm {version}.

| | |
|---|---|
| data | {dataset}, {clients} clients, partition {partition}, scenario {scenario} |
| method | {method} |
| training | rounds: {rounds}, clients per round: {cohort}, local epochs: {epochs}, seed: {seed} |
| adapter | rank {rank}; {trained}: {trainable:,} trained parameters |
| exchanged | {up} sent by the clients, {down} received |

## Scores

{metric} on the test split:

| | score | standard error |{beside}
|---|---|---|{rule}
{scores}

## Privacy

Clients kept their samples and sent updates of the adapter{compressed}. Updates can reveal information about the samples that they were trained on.
{privacy} {where}

## Use

```python
{imports}from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained({base})
base = AutoModelForImageTextToText.from_pretrained({base})
model = PeftModel.from_pretrained(base, "this folder")
```
{needs}
`fedmllm chat RUN --image FILE` phrases questions as in training ({prompt} prompt).
"""


NEEDS = """
Transformers loads this model's processor, which also supports video, only if torchvision is installed: `pip install torchvision`. With fedmllm
installed, `fedmllm.models.processors.load_processor` loads it without torchvision, for images and text.
"""

MERGED = """# {model}, fine-tuned with fedmllm

The complete model with a trained LoRA adapter merged into its weights, as a Transformers folder.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("this folder")
model = AutoModelForImageTextToText.from_pretrained("this folder")
```
{needs}"""


def merged_card(model: str, torchvision: bool) -> str:
    """Return the model card of a merged model, in Markdown.

    Args:
        model: the model's name in the experiment.
        torchvision: whether Transformers needs torchvision to load the model's processor.
    """
    return MERGED.format(model=model, needs=NEEDS if torchvision else "")


def adapter_card(result: RunResult, experiment: Experiment, client: str = "", torchvision: bool = False) -> str:
    """Return the model card of an adapter, in Markdown with the metadata that model hubs read.

    Args:
        result: the run's result.
        experiment: the run's settings.
        client: the client whose personalized adapter this is; empty for the global adapter.
        torchvision: whether Transformers needs torchvision to load the model's processor.
    """
    federation, lora, compression = experiment.federation, experiment.lora, experiment.compression.name
    rows = [
        f"| {name.replace('_', ' ')} | {score:.3f} | {'' if error is None else f'{error:.3f}'} |{_beside(result, name)}"
        for name in SCORES
        if (score := result.scores.get(name)) is not None
        for error in [result.standard_errors.get(name)]
    ]
    return CARD.format(
        model=result.model,
        imports="from fedmllm.models.source import model_source\n" if result.model == "nano" else "",
        base='model_source("nano")' if result.model == "nano" else f'"{result.model}"',
        title=f"{result.experiment}: personalized for {client}" if client else result.experiment,
        version=result.versions["fedmllm"],
        dataset=experiment.data.dataset,
        clients=result.num_clients,
        scenario=federation.scenario,
        partition=federation.partition,
        method=", ".join([result.algorithm, *result.strategies]),
        rounds=result.num_rounds,
        cohort=result.clients_per_round,
        epochs=experiment.training.local_epochs,
        seed=result.seed,
        rank=lora.r,
        trained="; ".join(result.trained),
        trainable=result.trainable_parameters,
        up=human_bytes(result.bytes_up),
        down=human_bytes(result.bytes_down),
        metric=result.metric,
        scores="\n".join(rows),
        beside="".join(f" {metric.replace('_', ' ')} |" for metric in result.beside),
        rule="---|" * len(result.beside),
        compressed="" if compression == "none" else f", compressed ({compression})",
        prompt=experiment.data.prompt,
        privacy=_privacy(result.privacy, result.secure),
        where=_where(experiment),
        needs=NEEDS if torchvision else "",
    )


def _privacy(statement: PrivacyStatement | None, secure: SecureStatement | None) -> str:
    """Return sentences that say what protects the adapter and the clients' updates."""
    if secure:
        rest = "This run used no differential privacy." if statement is None else _privacy(statement, None)
        return f"Secure aggregation: {secure.summary}. {secure.limits} {rest}"
    if statement is None:
        return "This run used neither differential privacy nor secure aggregation."
    return f"Differential privacy: {statement.summary}. {statement.mechanism} {statement.assumption} {UNPROTECTED}"


def _where(experiment: Experiment) -> str:
    """Return a sentence that says where the clients of a run were."""
    if experiment.engine.server is not None:
        return "The clients of this run were sites, which trained on their own machines."
    return "All clients of this run were simulated on one machine."


def _beside(result: RunResult, stage: str) -> str:
    """Return table cells with the metrics next to a stage's headline metric."""
    values = (result.details.get(stage, {}).get(metric) for metric in result.beside)
    return "".join(" |" if value is None else f" {value:.3f} |" for value in values)
