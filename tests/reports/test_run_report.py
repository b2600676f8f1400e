"""The report of a synthetic run folder: complete, self-contained, escaped and reproducible byte by byte."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl
import pytest

from fedmllm.errors import RunError
from fedmllm.evaluation.metrics import error_over_models
from fedmllm.format import duration, human_bytes
from fedmllm.reports.drawing import short
from fedmllm.reports.figures import _groups, _spread, client_samples
from fedmllm.reports.run_report import MAX_REFUSED, write_report
from fedmllm.reports.tables import _majority_row
from fedmllm.run.reader import Client
from run_folders import Folder, Page, round_line, table_rows

HOSTILE = "<script>alert('x')</script> \"&amp; $x^{$ _é日本"
NONE = "\N{EN DASH}"


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the finished run."""
    return Folder(tmp_path_factory.mktemp("runs") / "run").report()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "run")


def with_models_per_client(folder: Folder, personalized: bool = False) -> Folder:
    """The run with fine-tuned models and scores for each client: 0, 0.25, 0.5, ..., and the reverse for the local models."""
    assert folder.result is not None
    scores = {name: i % 5 / 4 for i, name in enumerate(folder.names)}
    reversed_scores = dict(zip(scores, reversed(scores.values()), strict=True))
    folder.lines += [round_line(f"fine_tuned-{name}", 1, 0.4 + i / 1000) for i, name in enumerate(folder.names)]
    folder.result["seconds_by_stage"] |= {f"fine_tuned-{name}": 2.0 for name in folder.names}
    folder.result |= {"clients": {"federated": scores, "local": reversed_scores, "fine_tuned": scores}, "personalized": personalized}
    return folder


def test_shown_scores_equal_the_inputs(html: str) -> None:
    rows = table_rows(html)
    assert rows["zero-shot"] == ["0.111", "0.012", "0.346", "0.789", "11 of 400", ""]
    # The standard deviation of 0.300 ... 0.303 is sqrt(5 / 3) / 1000. Every client failed on 3 of 400.
    spread = "4 clients: standard deviation 0.001, worst 0.300 (client-00)"
    assert rows["local mean"] == ["0.333", "0.023", "0.346", "0.789", "12 of 1,600", spread]
    assert rows["federated"] == ["0.568", "0.034", "0.346", "0.789", "22 of 400", ""]
    assert rows["centralized"] == ["0.778", "0.046", "0.346", "0.789", "33 of 400", ""]
    assert rows["ceiling"] == ["0.932", *[NONE] * 4, "population optimum"]
    assert rows["majority answer"][0] == "0.247"


def test_a_client_that_withholds_its_number_of_samples_is_left_out_of_the_counts(folder: Folder) -> None:
    counts = [client["num_samples"] for client in folder.manifest["clients"]]
    folder.manifest["clients"][0]["num_samples"] = None
    assert f"{sum(counts[1:])} training samples" in Page(folder.report()).text.replace(",", "")


def test_shown_rounds_equal_the_inputs(html: str) -> None:
    rows = table_rows(html)
    assert rows["1"] == ["2", "60", "1.00e-03", "2.0000", "", "1.00 MB", "2.00 MB", "3.00 MB"]
    assert rows["2"] == ["2", "60", "1.00e-03", "1.0000", "0.520", "1.00 MB", "2.00 MB", "6.00 MB"]
    assert rows["all"] == ["", "360", "", "", "", "6.00 MB", "12.0 MB", "18.0 MB"]


def test_the_summary_shows_settings_and_costs(html: str) -> None:
    text = Page(html).text
    assert "fine-tuned the model nano with fedavg (strategy: agnostic_prompt) on digits-vqa under the scenario missing-0.4" in text
    assert "6 rounds with 2 of 4 clients per round, 65,536 trainable parameters, seed 7" in text
    assert "sent 6.00 MB and received 12.0 MB" in text
    assert "took 1 min 15 s" in text
    # Six federated rounds with 2 s of training; four local stages with 1 s each.
    for words in ("train", "12.0 s", "local, all clients", "4.0 s"):
        assert words in text
    for words in ("a score can exceed it by chance", "12 rows had no image", "5 samples lost every modality"):
        assert words in text
    assert "torch 2.13.0" in text
    assert "seed: 7 # <kept> as it is" in text


def test_remarks_about_strategies_are_shown(folder: Folder) -> None:
    assert folder.result is not None
    folder.result |= {
        "remarks": {"feature_alignment": "nothing to <align>", "adaptive_regularization": "holds all"},
        "idle": ["feature_alignment"],
    }
    text = Page(folder.report()).text
    assert "feature_alignment had no effect in this run: nothing to <align>. adaptive_regularization: holds all." in text


def test_the_page_is_self_contained(html: str) -> None:
    page = Page(html)
    assert {"script", "link", "img", "iframe", "object", "image", "foreignobject"}.isdisjoint(page.tags)
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data", "action")]
    assert all(link.startswith("#") for link in links)
    namespaces = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s<>)]*", html)) == namespaces
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))


def test_ids_are_unique_and_every_reference_has_its_target(html: str) -> None:
    page = Page(html)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert page.tags.count("svg") == 5
    references = re.findall(r"url\(#([^)]*)\)", html) + [v[1:] for k, v in page.attributes if k == "xlink:href"]
    references += [value for name, value in page.attributes if name == "aria-labelledby"]
    assert references
    assert set(references) <= set(ids)


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run", labels=[HOSTILE, "_hidden", "", 'id="x" url(#y)'])
    folder.manifest |= {"dataset": HOSTILE, "scenario": HOSTILE, "notes": [HOSTILE]}
    for client in folder.manifest["clients"]:
        client["id"] = f"{HOSTILE} {client['id']}"
        client["modalities"] = {HOSTILE: 3, "": 1}
    folder.config = HOSTILE
    folder.lines[1]["refused"] = [{"client": HOSTILE, "reason": HOSTILE}]
    assert folder.result is not None
    folder.result |= dict.fromkeys(("experiment", "algorithm", "model"), HOSTILE)
    folder.result |= {"versions": {HOSTILE: HOSTILE}, "local": {HOSTILE: 0.5, "b": 0.6}, "clients": {"local": {HOSTILE: 0.5, "b": 0.6}}}
    html = folder.report()
    page = Page(html)
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) >= 10
    assert short(HOSTILE) in page.text
    assert "_hidden" in page.text
    assert 'id="x" url(#y)' in page.text


def test_the_pages_bytes_do_not_depend_on_matplotlibs_settings(html: str, folder: Folder) -> None:
    before = dict(mpl.rcParams)
    with mpl.rc_context({"font.size": 30, "axes.grid": True, "svg.fonttype": "path", "lines.linewidth": 9}):
        assert folder.report() == html
    assert dict(mpl.rcParams) == before


def test_numbers_change_the_bytes(html: str, folder: Folder) -> None:
    folder.lines[1]["loss"] = 1.999
    assert folder.report() != html


def test_an_unfinished_run_shows_its_rounds(folder: Folder) -> None:
    folder.result, folder.lines = None, folder.lines[:4]
    html = folder.report()
    rows, text = table_rows(html), Page(html).text
    assert "Unfinished." in text
    assert "after 3 federated rounds" in text
    assert rows["zero-shot"][:2] == ["0.111", "0.019"]
    assert rows["federated"] == ["0.520", "0.019", "0.346", "0.789", "3 of 400", "after round 2"]
    assert rows["centralized"][0] == rows["local mean"][0] == rows["ceiling"][0] == "not yet"
    assert "majority answer" not in rows
    assert "not requested" not in text


def test_a_finished_run_is_not_called_unfinished(html: str) -> None:
    assert "Unfinished" not in Page(html).text


def test_a_run_without_rounds_has_a_report(folder: Folder) -> None:
    folder.result, folder.lines = None, []
    html = folder.report()
    assert "No federated round has finished yet." in html
    assert Page(html).tags.count("svg") == 1


def test_a_run_without_scores_has_a_report(folder: Folder) -> None:
    folder.result, folder.lines = None, [round_line("federated", 1)]
    assert "no round has been evaluated yet" in folder.report()


def test_rounds_without_steps_have_no_loss(folder: Folder) -> None:
    folder.lines[1]["loss"] = None
    assert table_rows(folder.report())["1"][3] == NONE


def test_null_scores_are_shown_as_not_requested(folder: Folder) -> None:
    assert folder.result is not None
    nothing = dict.fromkeys(("zero_shot", "local_mean", "centralized", "ceiling"))
    folder.result |= {"local": {}, "majority": None, "details": {"federated": {"score": 0.5678, "num_samples": 400, "failures": 0}}}
    folder.result["scores"] |= nothing
    folder.result["standard_errors"] |= nothing
    folder.lines = [line for line in folder.lines if line["stage"] == "federated"]
    html = folder.report()
    rows = table_rows(html)
    assert [rows[name][0] for name in ("zero-shot", "local mean", "centralized")] == ["not requested"] * 3
    assert rows["ceiling"][0] == rows["majority answer"][0] == "unknown"
    assert rows["federated"][:2] == ["0.568", "0.034"]
    assert "population optimum" not in html


def test_a_model_that_does_not_beat_answers_without_content_is_reported(folder: Folder) -> None:
    assert folder.result is not None
    assert "does not beat" not in folder.report()
    folder.result["question_only"] = 0.95
    html = folder.report()
    assert table_rows(html)["question only"][0] == "0.950"
    assert "It does not beat the most frequent answer to each question, so there is no evidence" in Page(html).text
    folder.result["majority"] = folder.result["scores"]["federated"]
    assert "It does not beat the majority answer or the most frequent answer to each question" in Page(folder.report()).text


def test_an_unfinished_run_shows_its_validation_score(folder: Folder) -> None:
    folder.result = None
    folder.manifest["validation"] = folder.manifest["test"]
    folder.lines = [line for line in folder.lines if line["stage"] == "federated"][:2]
    for line in folder.lines:
        line |= {"score": None, "scores": None, "validation": {"score": 0.4321}}
    html = folder.report()
    assert "After round 2 the federated model has so far reached a score" in Page(html).text
    assert table_rows(html)["2"][4:6] == ["0.432", ""]


def test_under_auc_chance_replaces_the_majority_answer(folder: Folder) -> None:
    assert folder.result is not None
    folder.manifest["metric"] = folder.result["metric"] = "auc"
    folder.result["majority"] = 0.5
    assert table_rows(folder.report())["chance"][0] == "0.500"


def test_trainable_parts_are_shown_with_their_costs(folder: Folder) -> None:
    assert folder.result is not None
    folder.result |= {"parts": {"adapters": 5_000_000, "connector": 0, "embeddings": 543_570_944}, "trained": ["adapters"]}
    rows = table_rows(folder.report())
    assert rows["adapters"] == ["5,000,000", "20.0 MB", "10.0 MB", "trained"]
    assert rows["embeddings"] == ["543,570,944", "2.17 GB", "1.09 GB", "frozen"]
    assert "connector" not in rows


def test_shown_costs_equal_the_inputs(html: str, folder: Folder) -> None:
    rows = table_rows(html)
    assert rows["sent by the clients (up)"] == ["1.00 MB", "1.00 MB", "6.00 MB"]
    assert rows["received by the clients (down)"] == ["2.00 MB", "2.00 MB", "12.0 MB"]
    assert rows["server time to receive and aggregate"] == ["0.25 s", "0.25 s", "1.5 s"]
    # An older run's lines do not record the aggregation's memory.
    assert "memory of the aggregation" not in rows
    for line in folder.lines[1:7]:
        line |= {"bytes_held": 1000 * line["round"], "bytes_up": 100 * line["round"]}
    rows = table_rows(folder.report())
    # The mean of 1 ... 6 is 3.5.
    assert rows["memory of the aggregation"] == ["3.50 kB", "6.00 kB", ""]
    assert rows["sent by the clients (up)"] == ["350 B", "600 B", "2.10 kB"]


def test_rounds_whose_passes_did_not_fit_are_named(html: str, folder: Folder) -> None:
    assert "ran out of memory" not in html
    for line in folder.lines[2:4]:
        line["halvings"] = {"client-00": 1}
    assert "passes ran out of memory and were repeated in halves: 2, 3." in Page(folder.report()).text


def test_scores_by_client(html: str, folder: Folder) -> None:
    assert "own kind" not in Page(html).text
    page = with_models_per_client(folder).report()
    rows = table_rows(page[page.index("Each client on its own kind") :])
    # Four clients with 0, 0.25, 0.5 and 0.75: standard deviation sqrt(0.3125 / 3).
    assert rows["federated"] == ["4", "0.375", "0.000", "0.323", "0.000", "0.750", "client-00"]
    assert rows["local"] == ["4", "0.375", "0.000", "0.323", "0.000", "0.750", "client-03"]
    assert rows["fine-tuned"] == rows["federated"]
    assert Page(page).tags.count("svg") == 6
    assert "mean 0.375, worst decile 0.000" in Page(page).text
    assert "Federated: the global model." in Page(page).text
    assert "could not be asked" not in page


def test_clients_without_samples_of_their_kind_are_counted(folder: Folder) -> None:
    assert with_models_per_client(folder).result is not None
    folder.result["clients"] = {"federated": {"client-02": 0.5}}
    page = folder.report()
    assert "3 clients could not be scored, because the test split has no samples with their labels." in Page(page).text
    assert table_rows(page[page.index("Each client on its own kind") :])["federated"][:4] == ["1", "0.500", "0.500", NONE]


def test_a_run_without_scored_clients_has_a_report(folder: Folder) -> None:
    assert folder.result is not None
    folder.result["clients"] = {}
    assert "own kind" not in folder.report()


def test_fine_tuned_models_are_shown_beside_the_local_ones(folder: Folder) -> None:
    page = with_models_per_client(folder).report()
    row = table_rows(page[: page.index("Each client on its own kind")])["fine-tuned mean"]
    # 0.400 ... 0.403: mean 0.4015, standard deviation sqrt(5 / 3) / 1000, its error half of that; 3 of 400 failed for each.
    assert row == [
        *("0.402", "0.001", "0.346", "0.789", "12 of 1,600"),
        "4 clients: standard deviation 0.001, worst 0.400 (client-00)",
    ]  # fmt: skip
    text = Page(page).text
    # Four stages of 2 s.
    assert "fine-tuned clients" in text
    assert "8.0 s" in text
    assert "fine_tuned-client" not in text


def test_fine_tuned_models_have_no_row_if_there_are_none(html: str, folder: Folder) -> None:
    assert "fine-tuned mean" not in html
    assert "fine-tuned clients" not in html
    folder = with_models_per_client(folder)
    folder.result = None
    unfinished = folder.report()
    assert "fine-tuned mean" not in unfinished
    assert "fine-tuned clients" in unfinished


def test_a_personalized_methods_score_is_explained(html: str, folder: Folder) -> None:
    page = with_models_per_client(folder, personalized=True).report()
    text = Page(page).text
    assert table_rows(page[: page.index("Each client on its own kind")])["federated"][-1] == "mean of the clients&#39; personalized models"
    assert "personalized models reached a mean score (accuracy) of 0.568 ± 0.034" in text
    assert "Federated: the global model." not in text
    assert "personalized model" not in Page(html).text


def test_scores_of_many_clients_are_summarized(tmp_path: Path) -> None:
    page = with_models_per_client(Folder(tmp_path / "run", 200, 3)).report()
    # 40 of 200 clients score 0, so the worst 20 do.
    assert table_rows(page[page.index("Each client on its own kind") :])["local"][:3] == ["200", "0.500", "0.000"]
    assert len(page) < 1_000_000


def test_standard_error_over_clients() -> None:
    # For 0 and 1: standard deviation sqrt(1 / 2), divided by sqrt(2).
    assert error_over_models([0.0, 1.0]) == pytest.approx(0.5)
    assert error_over_models([0.3]) is None
    assert error_over_models([]) is None


def test_refused_updates_are_listed_and_counted(html: str, folder: Folder) -> None:
    assert "Refused updates" not in html
    folder.lines[2]["refused"] = [{"client": "client-01", "reason": f"reason {i}"} for i in range(MAX_REFUSED + 1)]
    refused = folder.report()
    assert table_rows(refused)["federated"] == ["2", "client-01", f"reason {MAX_REFUSED - 1}"]
    assert f"reason {MAX_REFUSED}<" not in refused
    assert f"{MAX_REFUSED + 1} in total, of which the first {MAX_REFUSED} are listed" in refused


@pytest.mark.parametrize(("num_clients", "num_rounds", "num_labels"), [(1, 1, 1), (2, 1, 2), (40, 3, 12), (200, 120, 40)])
def test_reports_scale_with_clients_rounds_and_labels(tmp_path: Path, num_clients: int, num_rounds: int, num_labels: int) -> None:
    labels = [f"a rather long name of category {i:02d}" for i in range(num_labels)]
    html = Folder(tmp_path / "run", num_clients, num_rounds, labels).report()
    text = Page(html).text
    assert ("other (29 labels)" in text) == (num_labels == 40)
    assert ("200 clients, largest first" in text) == (num_clients == 200)
    assert len(html) < 1_000_000


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "metrics.jsonl"])
def test_a_folder_that_cannot_be_read_keeps_its_old_report(folder: Folder, name: str) -> None:
    report = folder.write() / "report.html"
    report.write_text("old")
    (folder.path / name).unlink()
    before = set(folder.path.iterdir())
    with pytest.raises(RunError, match=name):
        write_report(folder.path)
    assert report.read_text() == "old"
    assert set(folder.path.iterdir()) == before


def test_a_report_that_cannot_be_written_is_an_error(folder: Folder) -> None:
    (folder.write() / "report.html").mkdir()
    with pytest.raises(RunError, match=r"report\.html: cannot be written"):
        write_report(folder.path)


def test_the_rarest_labels_are_grouped() -> None:
    # 13 labels with 13, 12, ..., 1 samples: the 11 most frequent stay in their order, and 2 + 1 remain.
    clients = [{f"label {i:02d}": 13 - i for i in range(13)}, {"label 00": 1}]
    groups = _groups(clients, ["#000000"])
    assert [group.name for group in groups] == [*(f"label {i:02d}" for i in range(11)), "other (2 labels)"]
    assert groups[0].counts == [13, 1]
    assert groups[-1].counts == [3, 0]


def test_spread_keeps_order_and_gap() -> None:
    assert _spread([0.0, 5.0, 9.0], 1.0) == [0.0, 5.0, 9.0]
    # Moved up: 0, 1, 2. Moved down: -2, -1, 0.
    assert _spread([0.0, 0.0, 0.0], 1.0) == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 B"), (999, "999 B"), (999.6, "1.00 kB"), (1000, "1.00 kB"), (12_345, "12.3 kB"), (999_499, "999 kB"), (999_600, "1.00 MB"),
     (2.5e9, "2.50 GB"), (3e15, "3,000 TB")],
)  # fmt: skip
def test_human_bytes(count: float, words: str) -> None:
    assert human_bytes(count) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0.00 s"), (0.994, "0.99 s"), (0.996, "1.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (7620, "2 h 07 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_short_keeps_both_ends() -> None:
    assert short("  plain\nwords ") == "plain words"
    assert short("") == "(none)"
    assert short("St. Elsewhere University Hospital 11") == "St. Elsewh…spital 11"
    assert len(short("x" * 21)) == 20
    assert short("x" * 20) == "x" * 20


def test_clients_without_labels_and_modalities_are_drawn_without_a_legend() -> None:
    """Sites may withhold both. Matplotlib warns of an empty legend, and warnings are errors here."""
    clients = [Client(id=name, num_samples=None, labels={}, modalities={}) for name in ("a", "b")]
    assert str(client_samples(clients)).count("unknown") == 2


def test_a_majority_answer_unknown_to_the_server_is_explained() -> None:
    assert _majority_row("accuracy", None).note == "unknown, because sites do not report their training answers"
    assert _majority_row("auc", 0.5).name == "chance"
