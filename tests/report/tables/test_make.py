"""`patchssl tables`: from a folder of records, whatever else lies there, to table files."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from made_results import made_up_records
from typer.testing import CliRunner

from patchssl.cli import build_app
from patchssl.report.tables.build import write_tables
from patchssl.report.tables.cost import CostRecord, Step
from patchssl.report.tables.make import make_tables
from patchssl.report.tables.render import LONGEST_CELL, LONGEST_NOTE
from patchssl.runtime.errors import DataError

RECORD = next(made_up_records(1))
COST = CostRecord(arch="vit", num_prototypes=8, images=2, views="2 x 224 px", device="CPU", threads=1,
                  clock="processor",
                  memory="resident", versions={},
                  steps=[Step(method="dino", way="", seconds=[1.0], peak_mib=10.0, floor_mib=5.0)])
NAME = "<img src=x onerror=alert(1)>|\x1b[31m`c` **b** ![i](http://example.org/t.png) \\| ../../x \u202e\u4e2d"


def record(number, **changes):
    return dataclasses.replace(RECORD, weights_sha256=f"{number:064x}"[::-1], **changes)


def hostile():
    return record(1, model=NAME, arch="x" * 10_000, pretrain_data="\u2028data\n## heading",
                  protocol_fingerprint="2" * 16,
                  protocol_settings={"many": list(range(10_000)), "selection": ["best test epoch"]})


@pytest.fixture
def spoiled(tmp_path):
    """A record that can be used among some that cannot, one of them hostile."""
    root = tmp_path / "results"
    RECORD.write(root)
    hostile().write(root)
    record(5, model="network <b>").write(root)
    record(6, dataset="a/../../etc").write(root)
    whole = json.dumps(RECORD.as_dict())
    for name, text in {"cut.json": whole[:300], "empty.json": "", "bytes.json": "\udcff", "list.json": "[]",
                       "version.json": whole.replace('"schema": 1', '"schema": 0'), "deep.json": "[" * 100_000,
                       "control\x1b[31m.json": "{", "surrogate.json": whole.replace("network-0", "\\ud800"),
                       "cut.cost.json": json.dumps({"format": "patchssl cost"})}.items():
        (root / name).write_text(text, errors="surrogateescape")
    os.mkfifo(root / "pipe.json")
    record(2, task="../x").write(root)
    record(7, task="knnn").write(root)
    record(3, metrics={"other": 0.5}).write(root)
    return root


def test_what_cannot_be_used_is_named_and_the_rest_made(spoiled, tmp_path):
    text, paths, problems = make_tables(spoiled, tmp_path / "out", paper=True)
    assert [path.name for path in paths] == [f"{stem}.{end}" for stem in ("table", "paper")
                                             for end in ("md", "csv", "tex")]
    assert len(problems) == 16
    for word in ("cut.json", "empty.json", "bytes.json", "list.json", "schema 0", "deep.json", "surrogate.json",
                 "cut.cost.json", "pipe.json", "its task is a path that leads out",
                 "none of the metrics", "its model holds HTML: 'network <b>'", "its dataset is a path that leads out",
                 "its model holds HTML: '<img", "task 'knnn' is unknown"):
        assert sum(word in problem for problem in problems) == 1, word
    assert f"{100 * RECORD.metrics['top1@20']:.1f}" in text
    assert not [path for path in tmp_path.rglob("*") if path.parent not in (tmp_path, spoiled, tmp_path / "out")
                and not path.is_relative_to(spoiled)]
    again = [path.read_bytes() for path in make_tables(spoiled, tmp_path / "again", paper=True)[1]]
    assert again == [path.read_bytes() for path in paths]


@pytest.mark.parametrize(("change", "reason"), [({"model": "<script>alert(1)</script>"}, "its model holds HTML"),
                                               ({"dataset": "../../../etc"}, "its dataset is a path that leads out")])
def test_a_hostile_record_is_named_and_left_out(tmp_path, change, reason):
    RECORD.write(tmp_path)
    hostile = record(1, **change).write(tmp_path)
    text, _, problems = make_tables(tmp_path, tmp_path / "out")
    assert len(problems) == 1 and problems[0].startswith(f"{hostile} is left out: {reason}")
    alone = tmp_path / "alone"
    RECORD.write(alone)
    assert text == make_tables(alone, alone)[0]


def test_a_hostile_name_that_got_through_is_text_in_every_format(tmp_path):
    (tmp_path / "out").mkdir()
    markdown, numbers, latex = write_tables([RECORD, hostile()], tmp_path / "out")
    text = markdown.read_text("utf-8")
    assert text.isprintable() or set(re.findall(r"[^\n]", text)) == {c for c in text if c.isprintable()}
    assert "<img" not in text and "](http" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows}) == 1  # no pipe of a name ends a cell
    assert "\n## heading" not in text
    assert max(map(len, text.splitlines())) < 12 * LONGEST_CELL + LONGEST_NOTE
    plain = latex.read_text("utf-8")
    assert plain.isascii() and "\\textless{}img" in plain and "U+4E2D" in plain
    assert numbers.read_text("utf-8").count("\n") >= 3


def test_the_command_ends_with_one_and_sends_a_terminal_no_commands(spoiled):
    result = CliRunner().invoke(build_app(), ["tables", "--results", str(spoiled)])
    assert result.exit_code == 1
    assert "skipped: " in result.stderr and "control?[31m.json" in result.stderr
    assert "\x1b" not in result.output and (spoiled / "paper.tex").is_file()
    record(4, model="network-4").write(spoiled)
    result = CliRunner().invoke(build_app(), ["compare", "network-0-00000000", "network-4", "--results", str(spoiled)])
    assert result.exit_code == 1
    assert "B - A" in result.stdout and result.stderr.count("skipped: ") >= 8


def test_costs_alone_make_tables_and_nothing_at_all_does_not(tmp_path):
    with pytest.raises(DataError, match="make one with: patchssl eval knn"):
        make_tables(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(DataError, match=r"no result records that can be read: .*bad.json is damaged"):
        make_tables(tmp_path, tmp_path / "out")
    (tmp_path / "bad.json").unlink()
    COST.write(tmp_path)
    text, paths, problems = make_tables(tmp_path, tmp_path / "out", paper=True)
    assert [path.name for path in paths] == [f"{stem}.{end}" for stem in ("cost", "paper")
                                             for end in ("md", "csv", "tex")]
    assert text == paths[0].read_text() and not problems
    assert "| DINO " in text and text.strip() in paths[3].read_text()


def test_a_table_that_cannot_be_written_is_a_sentence(tmp_path):
    COST.write(tmp_path)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(DataError, match="could not be written"):
        make_tables(tmp_path, tmp_path / "out")


def test_records_are_read_and_tables_made_without_torch():
    code = "import sys, patchssl.report.tables.make; print({'torch', 'timm', 'matplotlib', 'faiss'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
