"""Folders and files whose names are no UTF-8: nothing fails, all of it is shown as text, and is read again."""

import os
import subprocess
import sys

import pytest
from packing import pack, png

from patchssl.data.open import open_images
from patchssl.eval.records import read_results
from patchssl.models.weights import read_weights

ODD = os.fsdecode(b"caf\xe9 <b>")


def patchssl(*words, ends=0):
    """Run a command with a stdout that refuses what is no UTF-8, as most terminals' settings make it."""
    done = subprocess.run([sys.executable, "-m", "patchssl", *map(str, words)], check=False, capture_output=True,
                          timeout=300, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
    said, told = done.stdout.decode("utf-8"), done.stderr.decode("utf-8")  # all of it is text
    assert done.returncode == ends, told
    return said, told


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Images, a run, a record."""
    root = tmp_path_factory.mktemp("bytes") / ODD
    for split, count in (("train", 8), ("val", 3)):
        for number, name in enumerate((b"cl\xe9a", b"a\nb")):
            for i in range(count):
                place = root / "set" / split / os.fsdecode(name) / os.fsdecode(b"\xff%d.png" % i)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(png(80 * number + 9 * i, (40, 40)))
    patchssl("pretrain", "quickstart", "--data", root / "set", "--out", root / "run", "optim.batch_size=4",
             "optim.epochs=2", "head.num_prototypes=64")
    patchssl("eval", "knn", root / "run", "--data", root / "set", "--results", root / "res")
    return root


def test_a_run_is_resumed_and_its_checkpoint_read(home):
    said, _ = patchssl("pretrain", "--resume", home / "run")
    assert "score it: patchssl eval knn $'" in said
    assert "caf\\351" in said
    assert set(read_weights(home / "run/checkpoint.pth").networks) == {"student", "teacher"}
    assert "trouble       none" in patchssl("inspect", home / "run")[0]


def test_a_record_stands_in_tables_and_on_the_page(home):
    (record,), problems = read_results(home / "res")
    assert (problems, record.dataset) == ([], "set")
    patchssl("tables", "--results", home / "res", "--out", home / "tab")
    assert {path.name for path in (home / "tab").iterdir()} >= {"table.md", "table.csv"}
    patchssl("report", "--results", home / "res", "--runs", home / "run", "--data", home / "set", "--out",
             home / "page")
    page = (home / "page/index.html").read_bytes().decode("utf-8")
    assert f"{os.fspath(home.name)}".encode("utf-8", "backslashreplace").decode() not in page  # its tag is escaped
    assert "cl\\udce9a" in record.detail["class_accuracy"]


@pytest.mark.slow
def test_figures(home):
    image = next((home / "set/train").rglob("*.png"))
    for words, out in ((("views", image), "v.png"), (("curves", home / "run"), "c.svg"),
                       (("attention", home / "run", image), "a.pdf")):
        patchssl("plot", *words, "--out", home / out)
        assert (home / out).stat().st_size > 1000


@pytest.mark.slow
def test_an_export_is_refused_by_name_and_goes_elsewhere(home, tmp_path):
    _, told = patchssl("export", home / "run", "--out", home / "exp", ends=2)
    assert "is no text in UTF-8" in told
    assert not (home / "exp").exists()
    patchssl("export", home / "run", "--out", tmp_path / "exp", "--format", "timm")
    weights = (tmp_path / "exp/model.safetensors").read_bytes()
    (home / "w.safetensors").write_bytes(weights)
    assert read_weights(home / "w.safetensors").networks.keys()


def test_lists_and_archives(home):
    whole = open_images(home / "set", "val")
    names = [name for name in whole.names if "\n" not in name]
    (home / "l.txt").write_bytes(b"\n".join(b"set/val/" + os.fsencode(name) for name in names))
    assert len(open_images(home / "l.txt")) == 3
    archive = pack(home / "x.tar", {f"val/{name}": (whole.root / name).read_bytes() for name in whole.names})
    found = open_images(archive, "val")
    assert (list(found.names), found.classes) == (list(whole.names), whole.classes)
    assert found.fingerprint == whole.fingerprint


def test_what_is_not_there_is_named(home):
    _, told = patchssl("eval", "knn", home / "nothing", "--data", home / "set", ends=2)
    assert "does not exist" in told
