"""`each` of cases.py: no row is lost behind one that fails, and none sees what another did."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import os
from cases import each

tried = []

@each(("number", "word"), [(1, "a"), (2, "b"), (3, "c")], ids=["one", "two", "three"])
@each("share", (0.5, 0.25))
def test_rows(number, word, share, tmp_path, monkeypatch):
    tried.append((number, word, share))
    assert not list(tmp_path.iterdir()) and "ROW" not in os.environ
    (tmp_path / "x").touch()
    monkeypatch.setenv("ROW", word)
    assert (number, share) not in ((2, 0.25), (1, 0.5))

def test_all_were_tried():
    assert tried == [(number, word, share) for number, word in ((1, "a"), (2, "b"), (3, "c")) for share in (0.5, 0.25)]
    assert "ROW" not in os.environ
"""


def test_every_row_is_tried_alone_and_each_that_fails_is_named(tmp_path):
    (tmp_path / "test_it.py").write_text(CODE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path,
                          env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)})
    failed = [line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith("SUBFAILED")]
    assert failed == ["SUBFAILED[one {'share': 0.5}] test_it.py::test_rows",
                      "SUBFAILED[two {'share': 0.25}] test_it.py::test_rows"], done.stdout
    assert done.returncode == 1 and "3 failed, 1 passed" in done.stdout, done.stdout
