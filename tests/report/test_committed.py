"""The tables under results/ are those that the code makes from the records there, to the byte."""

import json
import shutil
from pathlib import Path

import pytest
from cases import each

from patchssl.eval.records import read_results
from patchssl.report.tables.build import write_tables
from patchssl.report.tables.cost import read_costs, write_costs
from patchssl.report.tables.paper import read_unavailable, write_paper
from patchssl.study.config import load_study
from patchssl.study.folder import StudyFolder, runs_of
from patchssl.study.summary import summarize
from patchssl.study.tables import write_study

RESULTS = Path(__file__).parents[2] / "results"
QUICKSTART = ("pixels-32-e3b0c442", "random-9cbc6802", "quickstart-0-63abd19d")  # what seed 0 wrote


def records_of(folder: str):
    """The records a committed table was made from; the quickstart's own lie with the others on textures."""
    if folder != "quickstart":
        return read_results(RESULTS / folder)
    found = [read_results(RESULTS / "textures" / name) for name in QUICKSTART]
    return [record for records, _ in found for record in records], [p for _, problems in found for p in problems]


@each("folder", sorted(path.parent.name for path in RESULTS.glob("*/table.md")))
def test_a_committed_table_is_made_again_to_the_same_bytes(folder, tmp_path):
    records, problems = records_of(folder)
    assert records and not problems
    for path in write_tables(records, tmp_path):
        assert path.read_bytes() == (RESULTS / folder / path.name).read_bytes(), path.name


def test_the_committed_paper_tables_are_made_again_to_the_same_bytes(tmp_path):
    records, problems = read_results(RESULTS)
    costs, damaged = read_costs(RESULTS)
    assert not problems and not damaged
    paths = write_paper(records, tmp_path, costs=costs, unavailable=read_unavailable(RESULTS))
    for path in [*paths, *write_costs(costs, tmp_path)]:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RESULTS.glob("studies/*/study.md")))
def test_a_committed_study_is_summarized_again_to_the_same_bytes(name, tmp_path):
    file = RESULTS / "studies" / f"{name}.yaml"
    study = load_study(file if file.exists() else name)
    for folder in (name, *study.searches):
        shutil.copytree(RESULTS / "studies" / folder, tmp_path / folder,
                        ignore=shutil.ignore_patterns("study.*", "table.*"))
    data = {json.loads(path.read_text())["data"] for path in (tmp_path / name / "cells").iterdir()}
    assert len(data) == 1
    for path in write_study(summarize(StudyFolder(tmp_path / name, study, data.pop()), runs_of(study))):
        assert path.read_bytes() == (RESULTS / "studies" / name / path.name).read_bytes(), path.name


def test_the_table_on_the_first_screen_is_the_committed_one():
    """Row by row the words of README's table stand in that of the textures, which has more columns."""
    def rows(path):
        lines = [line for line in path.read_text("utf-8").splitlines() if line.startswith("| ")]
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]

    whole = {row[0]: row for row in rows(RESULTS / "textures" / "table.md")}
    first_screen = (RESULTS.parent / "README.md").read_text("utf-8").partition("## What the quickstart shows")[0]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in first_screen.splitlines()
             if line.startswith("| ") and "---" not in line and "Method" not in line]
    assert len(shown) == 4
    for row in shown:
        assert row == [whole[row[0]][i] for i in (0, 2, 3, 4)]
    figures = [part.partition('"')[0] for part in first_screen.split('src="')[1:]]
    assert len(figures) == 2 and all((RESULTS.parent / name).is_file() for name in figures)
