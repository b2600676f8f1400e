"""Reports: pages, figures and tables of runs and sweeps, and catalogs of datasets, methods and models."""

from pathlib import Path


def write_report_of(folder: Path) -> Path:
    """Write the report of a run folder or a sweep folder, and return its page.

    Raises:
        RunError: if the folder is neither, or its files are damaged.
    """
    # Imported here, because a folder needs only one of them.
    if (folder / "cells").is_dir():
        from fedmllm.reports.sweep_report import write_sweep_report

        return write_sweep_report(folder)
    from fedmllm.reports.run_report import write_report

    return write_report(folder)
