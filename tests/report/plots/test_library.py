"""Figures are the same whatever a notebook or a matplotlibrc asks of matplotlib."""

import os
import subprocess
import sys

import pytest
from cases import each

DRAW = ("import sys, numpy as np\nfrom pathlib import Path\nfrom patchssl.report.plots import Sheet, plot_views\n"
        "from patchssl.report.figures.draw import draw_views, recipe_of\n"
        "draw_views(['textures:0'], recipe_of('quickstart'), Path(sys.argv[1]))\n"
        "import os, matplotlib\nprint(os.environ.get('MPLBACKEND'), os.environ.get('MATPLOTLIBRC'),"
        " 'matplotlib.pyplot' in sys.modules)\n")


def draw(path, **variables):
    done = subprocess.run([sys.executable, "-c", DRAW, str(path)], check=False, capture_output=True, text=True,
                          timeout=200, env={**{name: value for name, value in os.environ.items() if name != "DISPLAY"},
                                            **variables})
    assert done.returncode == 0, done.stderr
    return path.read_bytes(), done.stdout.split()


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("usual") / "a.png", MPLBACKEND="")[0]


@each("backend", ["module://matplotlib_inline.backend_inline", "TkAgg", "nonsense"])
def test_backends_that_are_not_there(tmp_path, usual, backend):
    figure, (left, rc, pyplot) = draw(tmp_path / "a.png", MPLBACKEND=backend)
    assert figure == usual
    assert (left, rc, pyplot) == (backend, "None", "False")  # for what else the process does


@each("content", [b"text.usetex: True\nfont.size: 30\naxes.facecolor: red\nsavefig.transparent: True\n", b"\xff\xfe",
                  b"no: such\nfigure.dpi: many\n"])
def test_settings_of_a_user(tmp_path, usual, content):
    (tmp_path / "matplotlibrc").write_bytes(content)
    assert draw(tmp_path / "a.png", MATPLOTLIBRC=str(tmp_path / "matplotlibrc"))[0] == usual


def test_a_folder_for_settings_that_cannot_be_written(tmp_path, usual):
    assert draw(tmp_path / "a.png", MPLCONFIGDIR="/proc/none")[0] == usual
