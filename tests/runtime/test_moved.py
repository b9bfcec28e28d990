"""Other names of modules: doors of the public interface, and names of 0.1, which warn and work for one release."""

import importlib
import re
import subprocess
import sys
import warnings

import pytest

import patchssl
from patchssl.runtime.moved import DOORS, MOVED

# what the documents and scripts of 0.1 imported
SHOWN = """
from patchssl import Backbone, evaluate, load_backbone, pretrain
from patchssl.data import open_images, open_pair
from patchssl.eval.features import extract_features
from patchssl.eval.knn import knn_accuracy
from patchssl.eval.metrics import average_precision
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.revisited import score_ranking, score_similarity
from patchssl.eval.whitening import Whitening
from patchssl.geometry import View
from patchssl.matching import match_patches
from patchssl.drawing import draw_attention, draw_curves
from patchssl.loading import load_backbone
from patchssl.report.compare import compare
from patchssl.tabling import make_tables
from patchssl.workflows import score_knn
"""


def fresh(code):
    """What a fresh interpreter prints on stdout and stderr, which must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_all_that_earlier_documents_import_is_there_and_what_moved_warns():
    _, err = fresh(SHOWN)
    assert re.findall(r"<string>:\d+: FutureWarning: (\S+) is now", err) == [
        "patchssl.drawing", "patchssl.loading", "patchssl.report.compare", "patchssl.tabling",
        "patchssl.workflows.score_knn"]


def test_an_old_name_can_come_first():
    out, err = fresh("from patchssl.loading import load_backbone\nprint(load_backbone.__module__)")
    assert out == "patchssl.models.load\n"
    assert err.startswith("<string>:1: FutureWarning: patchssl.loading is now patchssl.models.load; the old name")


@pytest.mark.parametrize(("old", "new"), MOVED.items())
def test_a_moved_module_is_the_same_object_and_warns_whoever_imports_it(old, new, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(FutureWarning, match=re.escape(f"{old} is now {new}; the old name")) as caught:
        found = importlib.import_module(old)
    assert found is importlib.import_module(new) is sys.modules[old]
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.import_module(old) is found  # once is enough


@pytest.mark.parametrize(("door", "behind"), DOORS.items())
def test_a_door_is_the_same_object_and_does_not_warn(door, behind, monkeypatch):
    monkeypatch.delitem(sys.modules, door, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = importlib.import_module(door)
    assert found is importlib.import_module(behind) is getattr(patchssl, door.rpartition(".")[2])


@pytest.mark.parametrize("name", ["patchssl.nowhere", "patchssl.loading.nowhere", "patchssl.eval.nowhere"])
def test_unknown_names_fail_as_ever(name):
    with pytest.raises(ModuleNotFoundError, match=re.escape(f"No module named '{name}'")):
        importlib.import_module(name)


def test_unknown_attributes_fail_as_ever():
    for module in (patchssl, importlib.import_module("patchssl.workflows")):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nowhere'"):
            _ = module.nowhere


def test_importing_the_package_imports_nothing_behind_the_names():
    out, err = fresh("import sys, patchssl\nprint(*sorted(name for name in sys.modules if 'patchssl' in name))")
    assert (out.split(), err) == (["patchssl", "patchssl.runtime", "patchssl.runtime.moved"], "")
