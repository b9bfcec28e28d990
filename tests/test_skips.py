"""The rule of conftest.py: on CI nothing is skipped but what needs a GPU, in this process or in workers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")


def run_pytest(folder, code, ci, workers):
    folder.joinpath("conftest.py").write_text(CONFTEST.read_text())
    folder.joinpath("test_it.py").write_text("import pytest\n" + code)
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider", "--rootdir", folder]
    done = subprocess.run([*command, folder], check=False, capture_output=True, text=True, cwd=folder,
                          env=os.environ | {"CI": ci})
    return done.returncode, done.stdout


SKIP = "def test_a(): pass\n@pytest.mark.skip(reason='{}')\ndef test_b(): pass\n"


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("code", "ci", "expected"), [
    (SKIP.format("no such file here"), "true", 1),
    (SKIP.format("no such file here"), "", 0),
    (SKIP.format("needs a GPU") + "@pytest.mark.xfail\ndef test_c(): assert False\n", "true", 0),
    ("def test_a(): pytest.skip('later')\n", "true", 1),
    ("pytest.importorskip('no_such_module')\ndef test_a(): pass\n", "true", 1),
], ids=["mark", "not CI", "GPU and xfail", "call", "module"])
def test_a_skip_fails_the_run_on_ci_unless_it_needs_a_gpu(tmp_path, code, ci, expected, workers):
    returned, out = run_pytest(tmp_path, code, ci, workers)
    assert (returned == 1) == bool(expected), out
    assert ("which fails the run" in out) == bool(expected)
