"""The table of a sweep's audits: utility against epsilon against attack."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from fedmllm.evaluation.metrics import error_over_models
from fedmllm.reports.sweep_tables import NOTHING, Entry, Table, percent
from fedmllm.run.audit_result import AuditResult
from fedmllm.sweeps.comparison import Sweep
from fedmllm.sweeps.trained import Trained


def privacy_table(sweep: Sweep) -> Table | None:
    """Return score, stated epsilon, lower bound and the attacks' AUC by method; None if no cell was audited."""
    rows = []
    for method in sweep.methods:
        cells = [cell for cell in sweep.of(method, sweep.shared) if cell.run.audit is not None]
        if cells:
            rows.append(_row(method, sweep, cells))
    caption = (
        "Utility against epsilon against attack. Score in percent; AUC in percent of telling who was trained on, from the final adapter and from the "
        "updates (50 is chance); the largest epsilon that attacks rule out in any run with 95% confidence, and what they could rule out at most. Means "
        "over runs, with standard errors over seeds."
    )
    header = ("", "score", "epsilon", "ruled out", "at most", "AUC, adapter", "AUC, updates", "coins", "runs")
    return Table("privacy", caption, header, tuple(rows)) if rows else None


def _row(method: str, sweep: Sweep, cells: Sequence[Trained]) -> tuple[Entry, ...]:
    audits = [cell.run.audit for cell in cells if cell.run.audit is not None]
    numbers = (
        percent(sweep.mean_and_error(method, sweep.shared)),
        _stated(cells),
        f"{max(audit.lower_bound for audit in audits):.2f}",
        f"{max(audit.ceiling for audit in audits):.2f}",
        _auc(audits, "adapter"),
        _auc(audits, "updates"),
        f"{round(mean(audit.units for audit in audits))} {audits[0].unit}s",
        str(len(cells)),
    )
    return (Entry(method), *map(Entry, numbers))


def _stated(cells: Sequence[Trained]) -> str:
    """Return the largest stated epsilon and its unit."""
    found = [cell.result.privacy for cell in cells if cell.result.privacy is not None]
    known = [statement.epsilon for statement in found if statement.epsilon is not None and statement.guaranteed]
    return f"{max(known):.2f} per {found[0].unit}" if known else "none"


def _auc(audits: Sequence[AuditResult], attack: str) -> str:
    values = [audit.attacks[attack].auc for audit in audits if attack in audit.attacks]
    return percent((mean(values), error_over_models(values))) if values else NOTHING
