"""The tables under results/ are those that the code makes from the records there, to the byte."""

from pathlib import Path

import pytest

from patchssl.eval.results import read_results
from patchssl.report.cost import read_costs, write_costs
from patchssl.report.paper import write_paper
from patchssl.report.tables import write_tables

RESULTS = Path(__file__).parents[2] / "results"
QUICKSTART = ("pixels-32-e3b0c442", "random-9cbc6802", "quickstart-0-c2565524")  # what seed 0 wrote


def records_of(folder: str):
    """The records a committed table was made from; the quickstart's own lie with the others on textures."""
    if folder != "quickstart":
        return read_results(RESULTS / folder)
    found = [read_results(RESULTS / "textures" / name) for name in QUICKSTART]
    return [record for records, _ in found for record in records], [p for _, problems in found for p in problems]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in RESULTS.glob("*/table.md")))
def test_a_committed_table_is_made_again_to_the_same_bytes(folder, tmp_path):
    records, problems = records_of(folder)
    assert records and not problems
    for path in write_tables(records, tmp_path):
        assert path.read_bytes() == (RESULTS / folder / path.name).read_bytes(), path.name


def test_the_committed_paper_tables_are_made_again_to_the_same_bytes(tmp_path):
    records, problems = read_results(RESULTS)
    costs, damaged = read_costs(RESULTS)
    assert not problems and not damaged
    paths = [*write_paper(records, tmp_path, costs=costs), *(write_costs(costs, tmp_path) if costs else [])]
    for path in paths:
        assert path.read_bytes() == (RESULTS / path.name).read_bytes(), path.name
