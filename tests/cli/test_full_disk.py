"""A disk that is full: the sentence, the exit code, and what is printed and kept all the same."""

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from patchssl import cli
from patchssl.data.textures import textures
from patchssl.eval.records import Result, read_result

NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&embed_dim=24"


@pytest.fixture(autouse=True)
def a_place_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))


def refuse_below(monkeypatch, results):
    """No record is written below `results`."""
    write = Result.write

    def full(self, root):
        if Path(root) == results:
            (results.parent / "file").touch()
            root = results.parent / "file"
        return write(self, root)

    monkeypatch.setattr(Result, "write", full)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_number_is_printed_and_kept(patchssl, colors, tmp_path, monkeypatch, as_json):
    refuse_below(monkeypatch, tmp_path / "results")
    said = patchssl("eval", "knn", NETWORK, "--data", colors, "--results", tmp_path / "results", "--workers", 0,
                    "--device", "cpu", *(["--json"] if as_json else []))
    assert said.code == 4
    kept = read_result(Path(re.search(r"its record is kept in (\S+\.json): free some space", said.err)[1]))
    assert json.loads(said.out)["metrics"] == kept.metrics if as_json else "20-NN top-1" in said.out


def test_a_suite_goes_on_and_says_each_number(patchssl, colors, tmp_path, monkeypatch):
    refuse_below(monkeypatch, tmp_path / "results")
    said = patchssl("eval", "all", NETWORK, "--data", colors, "--results", tmp_path / "results", "--workers", 0,
                    "--device", "cpu", "--task", "knn", "--task", "linear")
    assert said.code == 1
    failed = r"failed: .*top-1 [\d.]+%.*, but the result could not be written .* record is kept"
    assert len(re.findall(failed, said.out)) == 2


def test_whoever_writes_says_that_the_disk_is_full(patchssl, tmp_path, monkeypatch):
    for number, pixels in enumerate(textures("val")[0][::200][:3]):
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((150, 150)).save(tmp_path / "photos" / f"{number}.png")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    said = patchssl("data", "make-revisited", tmp_path / "photos", tmp_path / "set")
    assert said.code == 1 and "No space left on device: not all could be written; free some space" in said.err
    assert not (tmp_path / "set").exists() and not (tmp_path / "set.partial").exists()
    monkeypatch.setattr(Path, "write_text", full)
    said = patchssl("export", NETWORK, "--out", tmp_path / "export")
    assert said.code == 1 and "No space left on device" in said.err and "should not happen" not in said.err
    assert not (tmp_path / "export").exists()


def small_files():
    """In the child: no file may be larger than 20 kB; EFBIG instead of the signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.slow
def test_a_limit_of_the_system_is_a_sentence_too(tmp_path):
    command = [sys.executable, "-m", "patchssl", "export", NETWORK, "--out", tmp_path / "export"]
    found = subprocess.run(command, text=True, capture_output=True, preexec_fn=small_files, check=False,
                           timeout=200, env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])})
    assert found.returncode == 1 and "nothing was exported" in found.stderr, found.stderr
    assert [path.name for path in tmp_path.iterdir()] == []
