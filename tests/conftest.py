"""What all tests share: a quiet, offline, single-threaded process, and small data and runs made once."""

import os
import shutil
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

# before torch, matplotlib and huggingface_hub are imported; subprocesses inherit them
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PATCHSSL_CACHE"] = tempfile.mkdtemp(prefix="patchssl-tests-")  # not the user's own, and one per worker
os.environ["MPLBACKEND"] = "Agg"
os.environ.pop("PATCHSSL_DEBUG", None)

GPU = "needs a GPU"

TINY = ("optim.epochs=2", "optim.batch_size=8", "optim.warmup_epochs=0.5", "model.depth=1", "model.embed_dim=24",
        "model.num_heads=3", "model.patch_size=8", "views.global_size=32", "views.num_local=2", "views.local_size=16",
        "head.num_prototypes=32", "head.hidden=32", "head.bottleneck=16", "run.workers=0", "run.threads=1",
        "run.log_seconds=0.001", "run.knn_every_epochs=0")


class Skips:
    """Under CI=true the run fails for every skip but those for want of a GPU."""

    def __init__(self):
        self.unwanted = []

    def note(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            place, line, reason = report.longrepr
            reason = reason.removeprefix("Skipped: ")
            if not reason.startswith(GPU):
                self.unwanted.append(f"{place}:{line}: {reason}")

    pytest_runtest_logreport = pytest_collectreport = note

    def pytest_sessionfinish(self, session):
        if self.unwanted and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        if self.unwanted:
            terminalreporter.section("skipped under CI=true, which fails the run", red=True)
            terminalreporter.line("\n".join(self.unwanted))


@pytest.hookimpl(optionalhook=True)  # without pytest-xdist nobody asks
def pytest_xdist_auto_num_workers(config):
    """A single file or test runs in this process: workers would take seconds to start."""
    return 0 if len(config.args) == 1 and ".py" in config.args[0] else None


def pytest_configure(config):
    asked = any(str(argument).startswith("-m") for argument in config.invocation_params.args)
    if not asked and not hasattr(config, "workerinput") and all("::" in name for name in config.args):
        config.option.markexpr = ""  # who names a test wants it, slow or not
    if os.environ.get("CI") == "true":
        config.pluginmanager.register(Skips(), "skips")


def pytest_unconfigure():
    shutil.rmtree(os.environ["PATCHSSL_CACHE"], ignore_errors=True)


def save_classes(root, counts):
    """Class folders of 40 x 32 images whose hue tells the class; `counts` is images per class by split."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for channel, name in enumerate(["red", "green", "blue"]):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (32, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def colors(tmp_path_factory):
    """A dataset of three classes that raw pixels tell apart: 48 images to train on, 12 to test on."""
    return save_classes(tmp_path_factory.mktemp("data") / "colors", {"train": 16, "val": 4})


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """An image file of 120 x 90 pixels."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    rows, columns = np.mgrid[:90, :120]
    Image.fromarray(np.stack([rows * 2, columns * 2, rows + columns], axis=-1).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def tiny_run(colors, tmp_path_factory):
    """The folder of a finished run of a tiny network on `colors`; do not write into it."""
    from patchssl.pretrain.run.start import pretrain

    return pretrain("quickstart", colors, tmp_path_factory.mktemp("runs") / "tiny", overrides=TINY, device="cpu")


@pytest.fixture
def patchssl(monkeypatch, capsys):
    """Run the command line in this process: `patchssl("eval", "knn", ...)` gives its code, out and err."""
    from patchssl.cli import main

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["patchssl", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture(scope="session")
def tiny():
    """Overrides that make a recipe for 32 px images as small as it can be."""
    return TINY
