"""Turn the rows of ``gpu.py`` into one report and into tables. This module needs no other package, so a table is written whatever is missing."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
OPTIMIZED_BYTES = 16
"""Bytes per trained parameter, as in ``fedmllm.models.memory``."""


def report(rows: list[Row], tiny: bool = False) -> Row:
    """Return versions, stages and measurements, with the values derived from them.

    ``times_trainer`` is samples per second divided by the Trainer's with the same model and shape of batches; ``mfu = needed FLOPs per second /
    FLOPs per second of the largest matrix product``; ``planned_bytes = weights + 16 * trained parameters * clients + bytes per token * tokens of the
    largest pass``. Each is present only if the rows that it needs are.
    """
    measured = [dict(row) for row in rows if "name" in row]
    ceiling = next((row["flops_per_s"] for row in measured if (row["stage"], row["name"]) == ("ceilings", "matrix")), None)
    loops = {(row["model"], row["shape"]): row for row in measured if row["stage"] == "trainer" and row.get("shape")}
    plans = {row["stage"]: row for row in measured if row["name"] == "plan"}
    for row in measured:
        if "samples" in row:
            row |= {"samples_per_s": row["samples"] / row["seconds"], "tokens_per_s": row["tokens"] / row["seconds"]}
        if row.get("flops") and ceiling:
            row["mfu"] = row["flops"] / row["seconds"] / ceiling
        trainer = loops.get((row.get("model"), row.get("shape")))
        if trainer and row["stage"] != "trainer":
            row["times_trainer"] = row["samples"] / row["seconds"] / (trainer["samples"] / trainer["seconds"])
        if "pass_tokens" in row and (plan := plans.get(row["stage"])):
            fixed = plan["weight_bytes"] + OPTIMIZED_BYTES * plan["trainable"] * row["clients"]
            row["planned_bytes"] = fixed + plan["bytes_per_token"] * row["pass_tokens"]
    versions = next((row for row in measured if row["name"] == "versions"), {})
    return {
        "tiny": tiny,
        "versions": {name: value for name, value in versions.items() if name not in ("stage", "name")},
        "stages": [row for row in rows if "outcome" in row],
        "passed": all(row.get("passed", True) for row in measured),
        "rows": [row for row in measured if row["name"] != "versions"],
    }


def table(whole: Row) -> str:
    """Return Markdown tables of the stages, the training rows, the gradient checks and the other measurements."""
    versions = whole["versions"]
    head = ", ".join(f"{name} {value}" for name, value in versions.items() if value and name != "memory_bytes")
    parts = ["# On a GPU" if not whole["tiny"] else "# A trial with tiny models: none of its numbers means anything", head or "no versions"]
    stages = _rows(("stage", "outcome", "s"), [(row["stage"], row["outcome"], f"{row['wall']:.0f}") for row in whole["stages"]])
    parts.append(stages)
    trained = [row for row in whole["rows"] if "samples" in row]
    titles = (
        "stage",
        "",
        "s (least to most)",
        "samples/s",
        "tokens/s",
        "MFU",
        "x Trainer",
        "peak GiB",
        "planned",
        "pass",
        "halved",
        "apart",
    )
    parts.append(_rows(titles, [_trained(row) for row in trained]))
    checks = [row for row in whole["rows"] if "passed" in row]
    verdicts = [(row["name"], f"{row['distance']:.1e}", f"{row['limit']:.0e}", "yes" if row["passed"] else "**no**") for row in checks]
    parts.append(_rows(("gradients", "distance", "limit", "passed"), verdicts))
    others = [row for row in whole["rows"] if "samples" not in row and "passed" not in row]
    parts.append(_rows(("stage", "", "value"), [(row["stage"], row["name"].replace("|", "/"), _value(row)) for row in others]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(titles: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) if rows else ""


def _trained(row: Row) -> tuple[str, ...]:
    def shown(name: str, form: str, scale: float | None = None) -> str:
        value = row.get(name)
        return "" if value is None else form.format(value / scale if scale else value)

    spread = f"{row['seconds']:.3g} ({row['least']:.3g} to {row['most']:.3g})"
    return (
        *(row["stage"], row["name"], spread, shown("samples_per_s", "{:.1f}"), shown("tokens_per_s", "{:,.0f}"), shown("mfu", "{:.1%}")),
        *(shown("times_trainer", "{:.1f}"), shown("peak_bytes", "{:.2f}", 2**30), shown("planned_bytes", "{:.2f}", 2**30)),
        *(shown("pass_tokens", "{:,}"), shown("halvings", "{}"), shown("distance", "{:.1e}")),
    )


_FORMS = (
    ("left_out", "left out: {}"),
    ("flops_per_s", "{:.3g} FLOP/s"),
    ("bytes_per_s", "{:.3g} B/s"),
    ("bytes_per_token", "{:,.0f} B a token"),
    ("idle", "{:.0%} idle"),
    ("share", "{:.1%} of the step"),
    ("count", "{:,} calls"),
    ("launches", "{:,} launches"),
    ("distance", "{:.1e} apart"),
    ("seconds", "{:.3g} s"),
)


def _value(row: Row) -> str:
    return ", ".join(form.format(row[name]) for name, form in _FORMS if row.get(name) is not None)
