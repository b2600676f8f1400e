"""Tables that the commands print: results, splits, methods and plans."""

from __future__ import annotations

import json
from statistics import mean

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedmllm.evaluation.metrics import error_over_models
from fedmllm.format import duration, human_bytes
from fedmllm.reports.drawing import LOOKS, MODELS
from fedmllm.reports.run_report import METRICS
from fedmllm.run.audit_result import AuditResult
from fedmllm.run.results import SCORES, RunResult, worst_decile
from fedmllm.types import Record


def result_table(result: RunResult) -> Table:
    """Return a table of scores with standard errors, and below them the clients' accuracy on samples like their own."""
    title = f"{result.experiment}: {result.metric} of {result.algorithm}, {result.num_clients} clients, {result.num_rounds} rounds, seed {result.seed}"
    table = Table("", result.metric, "standard error", *(METRICS[metric] for metric in result.beside), title=title, title_justify="left")
    for name in SCORES:
        score, error = result.scores[name], result.standard_errors[name]
        if score is not None:
            others = (_number(result.details.get(name, {}).get(metric)) for metric in result.beside)
            table.add_row(LOOKS[name].name, _number(score), _number(error), *others, style="bold" if name == "federated" else "")
    table.add_row("majority answer", "unknown" if result.majority is None else f"{result.majority:.3f}", "")
    if result.question_only is not None:
        table.add_row("question only", f"{result.question_only:.3f}", "")
    if result.validation:
        numbers = (_number(result.validation.get(key)) for key in ("score", "standard_error", *result.beside))
        table.add_row("validation split", *numbers)
    for copy, scores in result.tested.items():
        table.add_row(f"federated, tested on {copy}", *(_number(scores.get(key)) for key in ("score", "standard_error", *result.beside)))
    _add_clients(table, result)
    table.caption = (
        f"{human_bytes(result.bytes_up)} up, {human_bytes(result.bytes_down)} down, training and evaluation took {duration(result.seconds)}"
    )
    if result.below:
        table.caption += f"\nthe federated model does not beat {' or '.join(result.below)}"
    if result.privacy:
        table.caption += f"\nprivacy: {result.privacy.summary}"
    if result.secure:
        table.caption += f"\nsecure aggregation: {result.secure.summary}"
    table.caption_justify = "left"
    return table


def audit_lines(found: AuditResult) -> list[str]:
    """Return an audit's result as lines of text."""
    lines = [f"{found.units} {found.unit}s, each in the twin by a fair coin; AUC of telling members from others (0.5 is chance):"]
    rows = {f"from the {name}": score for name, score in found.attacks.items()}
    rows |= {f"from the adapter, samples with {name}": score for name, score in found.by_modality.items()}
    lines += [f"  {name:<44} {row.auc:.3f} ± {row.error:.3f}   found at 1% false alarms: {row.tpr:.1%}" for name, row in rows.items()]
    stated = "none" if found.epsilon is None else f"{found.epsilon:.2f} at delta {found.delta:g}"
    lines.append(
        f"epsilon: attacks rule out less than {found.lower_bound:.2f} (at most {found.ceiling:.2f} could be shown); stated: {stated}"
    )
    if found.contradicts:
        lines.append("the attacks contradict the stated epsilon: the guarantee does not hold; report it as a security fault")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _add_clients(table: Table, result: RunResult) -> None:
    """Add rows with each model's accuracy on samples like each client's own."""
    if result.clients:
        table.add_section()
    for model, look in MODELS.items():
        if scores := result.clients.get(model, {}).values():
            error = error_over_models(scores)
            table.add_row(
                f"{look.name}, accuracy on clients' own kind of samples", f"{mean(scores):.3f}", "" if error is None else f"{error:.3f}"
            )
            table.add_row(f"{look.name}, worst decile of clients", f"{worst_decile(scores):.3f}", "")


MAX_CLIENTS = 50
"""Maximum number of clients in a split's table; further clients are only counted."""


def split_view(record: Record) -> Group:
    """Return a split as a table of each client's samples, with notes and one sample as stored and in each wording."""
    clients = record["clients"]
    title = f"{record['dataset']}, {record['scenario']}, seed {record['seed']}: {sum(c['num_samples'] for c in clients):,} training samples"
    table = Table("client", "samples", "by label", "by modalities", title=title, title_justify="left")
    for row in clients[:MAX_CLIENTS]:
        table.add_row(row["id"], f"{row['num_samples']:,}", _counted(row["labels"]), _counted(row["modalities"]))
    if len(clients) > MAX_CLIENTS:
        table.add_row(f"... and {len(clients) - MAX_CLIENTS:,} more", "", "", "")
    for split in ("validation", "test"):
        held = record[split]
        table.add_row(split, f"{held['num_samples']:,}", _counted(held["labels"]), _counted(held["modalities"]))
    notes = [*record["notes"], *([f"{record['dropped']:,} samples lost every modality"] if record["dropped"] else [])]
    return Group(table, *(f"- {escape(note)}" for note in notes), "", *_example_lines(record["example"]))


def _counted(counts: dict[str, int]) -> str:
    return escape(", ".join(f"{name} {count:,}" for name, count in counts.items()))


def _example_lines(example: Record) -> list[str]:
    """Return a sample as stored, then its prompt in each wording."""
    stored = [f"sample {example['id']}", *(f"  {name}: {value}" for name, value in example["content"].items())]
    stored += [
        f"  question: {example['question']}",
        f"  options: {', '.join(example['options']) or 'none'}",
        f"  answer: {example['answer']}",
    ]
    prompts = [f"\n{name} wording\n{text}\n=> {example['target']}" for name, text in example["wordings"].items()]
    return [escape(line) for line in (*stored, *prompts)]


WORDS = {
    "exact": "exact",
    "heterogeneous_ranks": "ranks may differ",
    "personalized": "one model per client",
    "streams": "streams",
    "client": "changes how clients train",
    "weight": "changes the weights of updates",
    "prompt": "changes the wording of samples",
}
"""Texts for the properties of methods and for what strategies change."""

NOTES = (
    "up, down, keeps: in units of one LoRA adapter, per client and round, with K clients in the round",
    "streams: the server does not store individual updates, so its memory does not grow with the cohort",
)


def methods_view(record: Record) -> Group:
    """Return every method, then every strategy, with name, traits, summary, reference and parameters."""
    parts: list[RenderableType] = []
    for group, traits in (("methods", _method_traits), ("strategies", _strategy_traits)):
        for name, row in record[group].items():
            parameters = ", ".join(f"{key}: {json.dumps(value)}" for key, value in row["parameters"].items())
            lines = [row["summary"], row["reference"], *([f"parameters  {parameters}"] if parameters else [])]
            lines += [f"from        {row['origin']}"] if "origin" in row else []
            parts += [Text(name, style="bold"), Padding(Text("\n".join(["; ".join(traits(row)), *lines])), (0, 0, 1, 2))]
    return Group(*parts, *NOTES)


def settings_view(sections: Record) -> Group:
    """Return the settings of each section: name, default, type with rule, and meaning."""
    parts: list[RenderableType] = []
    for name, row in sections.items():
        parts += [Text(name, style="bold"), Padding(Text(row["summary"]), (0, 0, 0, 2))]
        for key, setting in row["settings"].items():
            default = "required" if setting["default"] is None else setting["default"]
            first = f"{key}: {default}   {' '.join(filter(None, (setting['type'], setting['rule'])))}".replace("`", "")
            parts += [Padding(Text(first), (0, 0, 0, 2)), Padding(Text(setting["meaning"].replace("`", "")), (0, 0, 0, 4))]
        parts.append(Text())
    return Group(*parts)


def plan_view(record: Record) -> Group:
    """Return a model's plan: parameters and bytes sent, memory by tokens per pass, largest pass by GPU memory, and trainable parts."""
    table = Table(show_header=False)
    for name, value in (
        ("parameters", f"{record['parameters']:,}"),
        ("trained", f"{record['trainable']:,}"),
        ("sent and received by a client per round, each", human_bytes(record["sent_per_client_and_round"])),
        ("memory of the frozen weights", human_bytes(record["weights"])),
        ("memory of a training pass, per token", human_bytes(record["kept_per_token"])),
        *((f"memory with {tokens:,} tokens in a pass", human_bytes(size)) for tokens, size in record["memory_by_tokens"].items()),
        *(
            (f"tokens in a pass on {card} GiB", f"{tokens:,}" if tokens else "does not fit")
            for card, tokens in record["tokens_by_gib"].items()
        ),
    ):
        table.add_row(name, Text(value, justify="right"))
    parts = Table("trainable part", title="Bytes that a client sends per round, if the part trains", title_justify="left")
    for column in ("parameters", "float32", "bfloat16"):
        parts.add_column(column, justify="right")
    parts.add_column("planned")
    for row in record["parts"]:
        count = row["parameters"]
        parts.add_row(row["name"], f"{count:,}", human_bytes(4 * count), human_bytes(2 * count), "trains" if row["trains"] else "")
    return Group(Text(record["model"], style="bold"), table, parts)


def plan_line(record: Record) -> str:
    """Return a model's plan in one line, to print before training."""
    return (
        f"plan  {record['parameters']:,} parameters, {record['trainable']:,} trained; "
        f"each client sends {human_bytes(record['sent_per_client_and_round'])} per round; "
        f"memory {human_bytes(record['memory_without_tokens'])} plus {human_bytes(record['kept_per_token'])} per token in a pass"
    )


def _method_traits(row: Record) -> list[str]:
    """Return a method's kind and properties, what it sends and keeps, and how many clients it needs."""
    traits = [row["kind"], *(WORDS[key] for key, value in row.items() if value is True), f"up {row['up']}", f"down {row['down']}"]
    traits += [f"each client keeps {size:g} ({name})" for name, size in row["client_state"].items()]
    return [*traits, *([f"at least {row['smallest_cohort']} clients per round"] if row["smallest_cohort"] > 1 else [])]


def _strategy_traits(row: Record) -> list[str]:
    """Return what a strategy changes, and whether FedMLLM(method) includes it."""
    published = ["part of FedMLLM(method)"] if row["published"] else []
    return [row["kind"], *(WORDS[change] for change in row["changes"]), *published]
