import json
import shutil

import pytest
from cases import each

from patchssl.report.logs import read_run_log
from patchssl.report.page.training import charts_of, compared, run_folders
from patchssl.runtime.errors import DataError, UsageError


@pytest.fixture
def run(tiny_run, tmp_path):
    """A copy of a finished run without its checkpoints."""
    folder = tmp_path / "runs" / "mine"
    shutil.copytree(tiny_run, folder, ignore=shutil.ignore_patterns("*.pth*"))
    return folder


def test_a_run_is_read_whole(run):
    log = read_run_log(run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert (log.name, len(log.rows), log.problems) == ("mine", len(lines), ())
    facts = dict(log.facts)
    assert (facts["method"], facts["epochs"], facts["prototypes"]) == ("pwself", "2", "32")
    assert facts["last loss"] == f"{lines[-1]['loss']:.3f} nats"
    charts = {chart.title: chart for chart in charts_of(log)}
    assert [line.label for line in charts["Loss"].lines] == ["total", "class tokens", "patches"]
    assert f"total from {lines[0]['loss']:.4g} to {lines[-1]['loss']:.4g}" in charts["Loss"].summary
    assert {"Entropy of the targets", "Effective rank of the class tokens", "Gradient"} <= set(charts)


def test_folders_of_runs_and_runs_are_both_understood(run):
    assert run_folders([run.parent]) == run_folders([run]) == run_folders([run, run.parent]) == [run]
    for wrong in (run / "nothing", run.parent.parent):
        with pytest.raises(UsageError, match=r"log\.jsonl"):
            run_folders([wrong])


def test_damaged_rows_are_counted_and_the_rest_is_drawn(run):
    lines = (run / "log.jsonl").read_text().splitlines()
    bad = ["{", "[1]", '{"epoch": 1e300}', '{"epoch": NaN}', '{"epoch": "<script>"}']
    (run / "log.jsonl").write_text("\n".join([lines[0], *bad, *lines[1:], '{"epoch": 1.5, "lo']) + "\n")
    log = read_run_log(run)
    assert len(log.rows) == len(lines)
    (problem,) = log.problems  # the last line, which a kill cut short, is no damage
    assert f"5 of {len(lines) + 6} rows" in problem


def test_a_log_without_a_row_is_refused(run):
    for content in (b"", b"\xff\xfe\x00", b"{}\n"):
        (run / "log.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="no row"):
            read_run_log(run)


@each(("facts", "recipe"), [
    *((facts, "a: [") for facts in ("", "[]", "{", '{"data": "x"}', '{"versions": 3, "recipe": 4}', "[" * 10**5)),
    ("{}", "[" * 10**4)])
def test_a_run_with_damaged_facts_keeps_its_curves(run, facts, recipe):
    (run / "run.json").write_text(facts)
    (run / "recipe.yaml").write_text(recipe)
    log = read_run_log(run)
    assert log.rows and charts_of(log)
    assert len(log.problems) == 1 and "mine" in log.problems[0]


def test_signs_of_collapse_are_said(run):
    row = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
    (run / "log.jsonl").write_text(json.dumps(row | {"marginal_entropy": 0.0}) + "\n")
    assert any("collapsed" in warning for warning in read_run_log(run).warnings)


def test_hostile_names_and_facts_are_not_shown(run):
    other = run.rename(run.with_name("<b>x"))
    assert read_run_log(other).name == "‹b>x"
    facts = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(facts | {"data": "<script>x</script>"}))
    assert "data" not in dict(read_run_log(other.rename(run)).facts)


def test_runs_are_compared_line_by_line(run, tmp_path):
    second = shutil.copytree(run, tmp_path / "second")
    logs = [read_run_log(run), read_run_log(second)]
    assert compared(logs[:1]) == []
    assert [[line.label for line in chart.lines] for chart in compared(logs)] == [["mine", "second"]] * 3  # no k-NN
