"""Names that files bring along reach no terminal raw: neither escapes nor what turns the order of letters."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packing import png

import patchssl
from patchssl.cli.options import echo
from patchssl.runtime.console import Console

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202egpj"
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def patchssl_says(*words):
    """All that a command writes to stdout and stderr, whatever it ends with."""
    done = subprocess.run([sys.executable, "-m", "patchssl", *map(str, words)], check=False, capture_output=True,
                          timeout=300, env={**os.environ, "PYTHONIOENCODING": "utf-8"})
    return (done.stdout + done.stderr).decode("utf-8")


@pytest.fixture
def folder(tmp_path):
    """Images in classes, some unreadable, and other files, all of them with escapes in their names."""
    for split in ("train", "val"):
        for name in ("a", "b"):
            place = tmp_path / f"set{EVIL}" / split / f"{name}{EVIL}"
            place.mkdir(parents=True)
            for number in range(3):
                (place / f"{number}{EVIL}.png").write_bytes(png(90 * number, (24, 24)))
            (place / f"bad{EVIL}.png").write_bytes(b"\x89PNG\r\n\x1a\n\x1b[31m")
            (place / f"other.{EVIL}").write_bytes(b"x")
    return tmp_path / f"set{EVIL}"


def test_names_of_files_classes_extensions_and_weights(folder):
    weights = folder.parent / f"net{EVIL}.pth"
    torch.save({"teacher": {f"layer{EVIL}": torch.ones(2)}, "arch": EVIL, "name": EVIL,
                "args": {"arch": EVIL}}, weights)
    for words in (("data", "check", folder), ("inspect", weights), ("models", EVIL), ("tables", "--results", folder),
                  ("eval", "knn", weights, "--data", folder), ("eval", "knn", "timm:vit", "--data", folder / "none"),
                  ("pretrain", "quickstart", "--data", folder, "--out", folder.parent / "run", "--dry-run")):
        said = patchssl_says(*words)
        assert said, words
        assert not RAW.search(said), (words, RAW.search(said), said)


def test_what_is_echoed_and_what_the_console_says(capsys):
    echo(f"one{EVIL}\ntwo")
    echo(EVIL, err=True)
    with Console(seconds_between_lines=0) as console:
        console.say(f"three{EVIL}")
        for done in (1, 2, 3):
            console.update(done, 3, what=f"four{EVIL}")
    said = capsys.readouterr()
    assert said.out == "one?]0;owned??[2J?31m?gpj\ntwo\n"
    assert "three" in said.err
    assert "four" in said.err
    assert not RAW.search(said.err)


def test_warnings_and_lines_of_a_log():
    code = ("import logging, sys, warnings\nfrom patchssl import cli\nname = '\\x1b[2J\\x9b'\n"
            "def command():\n    logging.getLogger('patchssl.x').warning('log %s', name)\n"
            "    warnings.warn(f'first {name}', FutureWarning)\n    warnings.warn(f'second {name}', UserWarning)\n"
            "cli.build_app = lambda: command\ncli.main()\n")
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
    said = done.stderr.decode("utf-8")
    assert all(word in said for word in ("log ?[2J?", "first ?[2J?", "second ?[2J?"))
    assert not RAW.search(said)


def test_commands_print_by_echo_alone():
    for path in (Path(patchssl.__file__).parent / "cli").glob("*.py"):
        found = re.findall(r"(?:typer|click)\.s?echo\(|(?<![\w.])print\(", path.read_text("utf-8"))
        assert found == (["typer.echo("] if path.name == "options.py" else []), path.name
    assert logging.lastResort is not None
