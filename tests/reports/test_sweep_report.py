"""The page and tables of a synthetic sweep folder."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fedmllm.evaluation.predictions import Answered, to_record
from fedmllm.privacy.statement import PrivacyStatement
from fedmllm.reports import sweep_tables as grid_tables
from fedmllm.reports.drawing import FILLS
from fedmllm.reports.gain_tables import beside_table, overview_table, strategy_table, survivors
from fedmllm.reports.sweep_figures import _levels, _unbeaten, strategy_gains
from fedmllm.reports.sweep_formats import to_csv, to_latex, to_markdown
from fedmllm.reports.sweep_report import write_sweep_report
from fedmllm.reports.sweep_tables import NOTHING, Entry, Table, client_table, hard_table, score_table
from fedmllm.run.audit_result import Coin, audited
from fedmllm.sweeps.comparison import Gain, read_sweep
from fedmllm.sweeps.pairs import Pair, acting, pairs
from fedmllm.sweeps.statistics import Interval
from run_folders import Page, table_rows
from sweep_folders import METHODS, changed, score_of, write_sweep


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "study")


def test_scores_ranks_and_baselines(sweep: Path) -> None:
    table = score_table(read_sweep(sweep), "nano", "cats")
    assert table.header == ("", "aligned", "missing-0.4", "mean", "rank")
    found = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert found["zero-shot"] == ["11.1 (0.0)", "11.1 (0.0)", "11.1 (0.0)", ""]
    assert found["FedAvg"] == ["56.0 (1.0)", "51.0 (1.0)", "53.5 (1.0)", "3.0"]
    # A method's seed with a missing cell counts in the columns that it has.
    assert found["FedProx_1 & co"] == ["65.0", "61.0 (1.0)", "62.5", "2.0"]
    best = {row[0].text for row in table.rows if row[1].best and row[2].best and row[3].best and row[4].best}
    assert best == {"<b>ours</b>"}
    assert found["FedAvg, published"] == ["71.0", "60.0", "65.5", ""]
    assert table.rules == (4, 7)


def test_the_auc_of_chosen_options_is_shown_beside_that_of_probabilities(sweep: Path) -> None:
    """For 0.2, 0.6 | 0.7, 0.9 the AUC is 1. For the choices 0, 1 | 1, 1 it is three quarters: two pairs right, two tied."""
    assert hard_table(read_sweep(sweep), "nano", "cats") is None
    choices = Answered("auc", ("auc",), np.zeros(4, int), np.array([0, 0, 1, 1]), np.array([0.2, 0.6, 0.7, 0.9]))
    for folder in (path for path in (sweep / "cells").iterdir() if path.is_dir()):
        for name in ("result.json", "manifest.json"):
            if (folder / name).exists():
                written = json.loads((folder / name).read_text()) | {"metric": "auc"}
                if "details" in written:
                    written["details"]["zero_shot"]["auc_hard"] = 0.25
                (folder / name).write_text(json.dumps(written))
        (folder / "predictions.json").write_text(json.dumps(to_record([choices])))
    table = hard_table(read_sweep(sweep), "nano", "cats")
    assert table is not None
    found = {row[0].text: [entry.text for entry in row[1:]] for row in table.rows}
    assert found["FedAvg"] == ["75.0 (0.0)", "75.0 (0.0)", "75.0 (0.0)", "2.0"]
    assert found["zero-shot"][0] == "25.0 (0.0)"
    assert found["FedAvg, published"][0] == "71.0"
    assert "local" not in found
    assert "of the chosen options" in Page(write_sweep_report(sweep).read_text()).text


def test_gains_are_over_cells_that_both_methods_have(sweep: Path) -> None:
    rows = {row[0].text: [entry.text for entry in row] for row in overview_table(read_sweep(sweep)).rows}
    assert rows["FedAvg"][3:6] == ["", "", ""]
    mean, interval, won = rows["<b>ours</b>"][3:6]
    assert (mean, won) == ("+20.0", "3 of 3")
    low, high = (float(end) for end in interval.split(" to "))
    assert low < 20 < high
    assert [rows[method][6] for method in METHODS] == ["1.00 MB", "10.0 MB", "100 MB"]


def test_bold_marks_what_survives_the_correction_not_the_best(sweep: Path) -> None:
    """Both seeds agree exactly on +10.0 and +20.0. Only the noise of 100 test samples remains, times t(1) = 12.7."""
    read = read_sweep(sweep)
    table = overview_table(read)
    assert [row[0].text for row in table.rows if row[1].best] == ["<b>ours</b>"]
    assert not any(row[3].sure for row in table.rows)
    assert "after Holm's correction over the rows of the table" in table.caption
    assert not any(entry.sure for row in score_table(read, "nano", "cats").rows for entry in row)
    gains = [Gain(0.1, Interval(0.0, 0.2, p), 1, 1, 3) for p in (0.03, 0.01)]
    assert survivors([None, *gains]) == [False, True, True]
    assert survivors([None, *gains, Gain(0.1, Interval(0.0, 0.2, 0.04), 1, 1, 3)]) == [False, False, True, False]


def test_a_table_of_one_seed_has_no_intervals_and_says_so(sweep: Path) -> None:
    for path in (sweep / "cells").glob("*-1.json"):
        path.unlink()
    table = overview_table(read_sweep(sweep))
    assert "With a single seed there are no intervals" in table.caption
    assert [[entry.text for entry in row[3:5]] for row in table.rows] == [["", ""], ["+10.0", NOTHING], ["+20.0", NOTHING]]
    assert not any(entry.sure for row in table.rows for entry in row)


def classified(score: float, extra: float) -> Answered:
    """Of 80 cats and 20 dogs, a share ``score`` of the cats and ``extra`` of the dogs is right; the others get the other class."""
    truth = np.repeat([0, 1], (80, 20))
    right = np.concatenate([np.arange(80) < round(80 * score), np.arange(20) < round(20 * extra)])
    return Answered("macro_f1", ("macro_f1",), np.zeros(100, int), truth, np.where(right, truth, 1 - truth).astype(float))


def test_a_gain_in_balanced_accuracy_may_be_a_loss_of_accuracy(sweep: Path) -> None:
    """FedAvg has 90 % of the cats and 10 % of the dogs right, ``ours`` 80 % and 50 %: accuracy 74 and 74, balanced accuracy 50 and 65."""
    assert beside_table(read_sweep(sweep), "nano", "cats") is None
    choices = {"FedAvg": classified(0.9, 0.1), "FedProx_1 & co": classified(0.9, 0.1), "<b>ours</b>": classified(0.8, 0.5)}
    for names in (sweep / "cells").glob("*.json"):
        method = json.loads(names.read_text())["method"]
        (names.with_suffix("") / "predictions.json").write_text(json.dumps(to_record([choices[method]])))
    read = read_sweep(sweep)
    table = beside_table(read, "nano", "cats")
    assert table is not None
    assert table.header[1::2] == ("accuracy", "balanced accuracy", "macro-F1")
    rows = {row[0].text: [entry.text for entry in row] for row in table.rows}
    assert rows["FedAvg"][1::2] == ["74.0 (0.0)", "50.0 (0.0)", f"{100 * macro(72, 8, 2, 18):.1f} (0.0)"]
    assert rows["<b>ours</b>"][2].startswith("+0.0 (")
    assert rows["<b>ours</b>"][4].startswith("+15.0 (")
    lines = list(csv.DictReader(io.StringIO(to_csv(read))))
    ours = [row for row in lines if row["method"] == "<b>ours</b>"]
    assert [float(ours[0][name]) for name in ("accuracy", "balanced_accuracy", "macro_f1")] == pytest.approx(
        [0.74, 0.65, macro(64, 16, 10, 10)]
    )
    assert "scores of the chosen options" in Page(write_sweep_report(sweep).read_text()).text


def macro(right_cats: int, missed_cats: int, right_dogs: int, missed_dogs: int) -> float:
    wrong = missed_cats + missed_dogs
    return right_cats / (2 * right_cats + wrong) + right_dogs / (2 * right_dogs + wrong)


def test_a_strategy_is_compared_with_the_same_method_without_it(sweep: Path) -> None:
    published = {"algorithm": "FedMLLM(fedavg)", "strategies": ["agnostic_prompt", "adaptive_regularization"]}
    changed(sweep, "FedProx_1 & co", "evaluation: {every: 2}\ndata: {prompt: agnostic}\n", **published)
    changed(sweep, "<b>ours</b>", "training: {batch_size: 2}\n")
    read = read_sweep(sweep)
    assert pairs(read) == [Pair(("adaptive_regularization",), "FedProx_1 & co", "FedAvg")]
    table = strategy_table(read, pairs(read))
    assert table is not None
    assert table.header == ("", "gain", "95%", "won", "aligned", "missing")
    (row,) = ([entry.text for entry in row] for row in table.rows)
    assert row[0] == "adaptive_regularization on FedAvg"
    assert (row[1], row[3]) == ("+10.0", "3 of 3")
    # One of two seeds exists for aligned settings, so there is no interval.
    assert row[4] == "+10.0"
    assert row[5].startswith("+10.0 (")
    assert "A difference from a single seed has no interval." in table.caption
    html = write_sweep_report(sweep).read_text()
    assert "adaptive_regularization on FedAvg" in Page(html).text
    assert Page(html).tags.count("svg") == 4


def test_cells_with_an_idle_strategy_are_left_out_of_its_mean(sweep: Path) -> None:
    """The mean leaves out a scenario in which the strategy is idle. A pair that adds two strategies stays if only one of them is idle."""
    strategies = {"strategies": ["agnostic_prompt", "feature_alignment"]}
    changed(sweep, "FedProx_1 & co", algorithm="fedavg", **strategies)
    changed(sweep, "<b>ours</b>", "training: {batch_size: 2}\n")
    read = read_sweep(sweep)
    (pair,) = pairs(read)
    aligned = {key for key in read.cells if key[0] == pair.method and key[1].scenario == "aligned"}
    for key in aligned:
        result = read.cells[key].run.result
        assert result is not None
        result.idle.append("feature_alignment")
    assert acting(read, pair).cells.keys() == read.cells.keys() - aligned
    assert acting(read, pair._replace(added=("feature_alignment", "label_calibration"))).cells == read.cells
    table = strategy_table(read, [pair])
    assert table is not None
    (row,) = ([entry.text for entry in row] for row in table.rows)
    others = sum(key[0] == pair.method and key not in aligned for key in read.cells)
    assert row[3] == f"{others} of {others}"
    assert row[4] == NOTHING
    assert row[5].startswith("+10.0 (")
    assert strategy_gains(read, [pair])
    for key in read.cells:
        if key[0] == pair.method and key not in aligned:
            result = read.cells[key].run.result
            assert result is not None
            result.idle.append("feature_alignment")
    table = strategy_table(read, [pair])
    assert table is not None
    assert [entry.text for entry in table.rows[0]] == [pair.label, "", "", "", NOTHING, NOTHING]
    assert strategy_gains(read, [pair])


@pytest.mark.parametrize(
    ("config", "values"),
    [
        ("", {"strategies": ["agnostic_prompt"]}),
        ("", {"strategies": ["adaptive_regularization"]}),
        ("training: {batch_size: 8}\n", {"strategies": ["agnostic_prompt", "adaptive_regularization"]}),
        ("", {"strategies": ["agnostic_prompt", "adaptive_regularization"], "algorithm": "fedprox"}),
    ],
)
def test_methods_that_differ_in_more_than_a_strategy_are_no_pair(sweep: Path, config: str, values: dict[str, Any]) -> None:
    changed(sweep, "FedProx_1 & co", config, **values)
    changed(sweep, "<b>ours</b>", "training: {batch_size: 2}\n")
    read = read_sweep(sweep)
    assert pairs(read) == []
    assert strategy_table(read, []) is None


def test_a_baseline_out_of_reach_is_named_at_the_edge() -> None:
    """Lines at 0.9 and 0.98 leave room for scores of 0.92 to 0.94; a line at 0.3 would not."""
    axes = Figure().add_subplot()
    _levels(axes, {"zero_shot": 0.3, "local_mean": 0.9, "ceiling": 0.98}, [0.92, 0.94])
    assert 0.85 < axes.get_ylim()[0] < 0.9
    assert 0.98 < axes.get_ylim()[1] < 1
    assert [text.get_text() for text in axes.texts] == ["not shown: zero-shot 0.3"]


def test_the_page_is_complete_escaped_and_reproducible(sweep: Path) -> None:
    html = write_sweep_report(sweep).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert not any(name in ("src", "href") and value.startswith("http") for name, value in page.attributes)
    assert "<b>ours" not in html
    assert table_rows(html)["FedAvg"][0].startswith("5")
    assert page.tags.count("svg") == 3
    assert "2 cells of the full product are missing" in page.text
    assert write_sweep_report(sweep).read_text() == html


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: apt-get install chromium")
def test_a_browser_shows_the_page_without_a_network(sweep: Path, tmp_path: Path) -> None:
    """Everything is laid out, nothing is requested from the network, and the figures have the methods' colors."""
    page, shot = write_sweep_report(sweep), tmp_path / "page.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--host-resolver-rules=MAP * ~NOTFOUND"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1000,3200", f"--screenshot={shot}"]
    shown = subprocess.run([str(CHROMIUM), *flags, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert not re.search(r"CONSOLE|ERR_", shown.stderr), shown.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB"), dtype=int)
    assert pixels.shape == (3200, 1000, 3)
    for color in FILLS[: len(METHODS)]:
        wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(pixels - wanted).max(-1) < 4).sum() > 20, color
    # The last text ends above the window's lower edge and within its width, so nothing was cut off.
    inked = (pixels < 200).any(-1)
    assert np.flatnonzero(inked.any(1)).max() < 3100
    assert not inked[:, -20:].any()


def test_means_are_over_columns_that_all_methods_have(sweep: Path) -> None:
    """The third method has no cell in one scenario, so the others' cells there do not count."""
    shutil.rmtree(sweep / "cells" / "2-aligned-0")
    for method, score in METHODS.items():
        changed(sweep, method, tested={"image": {"score": score - 0.1}}, clients={"federated": {"a": score, "b": score}})
    found = read_sweep(sweep)
    where = "averaged over runs of the 1 of 2 columns that all methods have (missing-0.4)."
    for table, numbers in ((grid_tables.tested_table(found), ["51.0", "40.0"]), (client_table(found), ["50.0", "50.0", "0.0", "2"])):
        assert table is not None
        assert table.caption.endswith(where)
        assert [entry.text for entry in table.rows[0]][1:] == numbers


def test_the_csv_file_has_a_line_for_each_cell(sweep: Path) -> None:
    write_sweep_report(sweep)
    rows = list(csv.DictReader((sweep / "results.csv").read_text().splitlines()))
    assert len(rows) == 10
    for row in rows:
        assert float(row["score"]) == score_of(row["method"], row["scenario"], int(row["seed"]))
        assert bool(row["centralized"]) == (row["method"] == "FedAvg")
        assert row["code"] == "abc"


def test_cells_of_different_code_versions_get_a_warning(sweep: Path) -> None:
    path = sweep / "cells" / "0-aligned-0.json"
    path.write_text(path.read_text().replace('"abc"', '"def"'))
    assert "Mixed code" in Page(write_sweep_report(sweep).read_text()).text


def test_latex_and_markdown_say_the_same() -> None:
    """Bold marks a significant result, italics a best one that is not significant."""
    entries = ((Entry("FedAvg"), Entry("50 %"), Entry("1", True)), (Entry("a_b & c|d"), Entry("60.1", sure=True), Entry("0")))
    table = Table("x", "A caption: 100 %.", ("", "mean_1", "won"), entries, (1,))
    tex, markdown = to_latex(table), to_markdown(table)
    assert r"FedAvg & 50 \% & \textit{1} \\" in tex
    assert r"a\_b \& c|d & \textbf{60.1} & 0 \\" in tex
    assert "| FedAvg | 50 % | *1* |" in markdown
    assert r"\caption{A caption: 100 \%.}" in tex
    assert tex.count(r"\midrule") == 2
    assert not re.search(r"(?<!\\)[%_&](?! )", tex.replace(" & ", ""))
    assert "| a_b & c/d | **60.1** | 0 |" in markdown


def test_unbeaten_methods_are_not_beaten_in_cost_and_score() -> None:
    points = {
        "small": (1.0, 0.2),
        "middle": (2.0, 0.5),
        "worse": (2.5, 0.4),
        "large": (9.0, 0.6),
        "twin": (9.0, 0.6),
        "wasteful": (20.0, 0.6),
    }
    assert _unbeaten(points) == ["small", "middle", "large", "twin"]


def test_audits_of_a_sweep_are_a_table(tmp_path: Path) -> None:
    """Utility, stated epsilon, what attacks rule out, and their AUC, for the methods with audited cells."""
    folder = write_sweep(tmp_path / "sweep")
    coins = [Coin("c", "text", bool(number % 2)) for number in range(40)]
    private = PrivacyStatement("sample", 7.5, 1e-5, 1.0, 0.1, None, "poisson", 10, 10, 0.1, True)
    for number, path in enumerate(sorted((folder / "cells").glob("0-*/result.json"))):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"privacy": dataclasses.asdict(private)}))
        scores = np.array([coin.member + number for coin in coins], dtype=float)
        found = audited("sample", 0, coins, {"adapter": scores, "updates": -scores}, private)
        (path.parent / "audit").mkdir()
        (path.parent / "audit" / "audit.json").write_text(json.dumps(found.to_record()))
    page = write_sweep_report(folder).read_text()
    table = page[page.index("<h2>Privacy</h2>") :]
    assert "Utility against epsilon against attack" in table
    for text in ("7.50 per sample", "100.0", "40 samples"):
        assert text in table
    assert "FedProx" not in table[: table.index("</table>")]
    assert "7.50 per sample" in (folder / "tables.md").read_text()
