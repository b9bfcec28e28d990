"""What is shown while something runs: everything on stderr, time left in both forms."""

import io
import re

import pytest
from cases import each

from patchssl.runtime import console as module
from patchssl.runtime.console import Console

ROW = {"loss": 1.23456, "images_per_second": 321.9, "knn_top1": 0.256}


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets: `clock.now = 5.0`."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_lines_come_every_ten_seconds_with_the_time_left(clock, capsys):
    console = Console()
    shown = []
    for done in range(1, 101):
        console.update(done, 100, ROW)
        clock.now += 1.0
        shown.append(capsys.readouterr())
    assert "".join(out for out, _ in shown) == ""
    lines = "".join(err for _, err in shown).splitlines()
    # an update each second: after the 11th, 89 of them are left
    assert lines[0] == "training 11 of 100, 1:29 left loss 1.235 322 images/s k-NN 25.6% (on training images)"
    assert [line.split()[1] for line in lines] == ["11", "21", "31", "41", "51", "61", "71", "81", "91", "100"]
    assert "left" not in lines[-1]


def test_time_left_does_not_count_what_was_done_before_a_resume(clock, capsys):
    console = Console()
    console.update(900, 1000)
    clock.now += 20
    console.update(910, 1000)
    assert capsys.readouterr().err == "training 910 of 1000, 3:00 left\n"


def test_a_second_task_starts_its_own_clock(clock, capsys):
    console = Console(seconds_between_lines=5)
    count = console.counter("features")
    for start in (0, 1000):
        clock.now += start
        for done in (10, 20):
            count(done, 20)
            clock.now += 2
    assert capsys.readouterr().err == "features 20 of 20\nfeatures 20 of 20\n"


@each(("seconds", "expected"), [(0.4, "0:00"), (3599.6, "1:00:00"), (90061, "25:01:01")])
def test_clock(seconds, expected):
    assert module.clock(seconds) == expected


def test_sentences_are_printed_as_they_are(capsys):
    sentence = "[bold]not markup[/bold] " + "long " * 60
    Console().say(sentence)
    assert capsys.readouterr().err == sentence + "\n"


def test_quiet_says_nothing(capsys):
    with Console(quiet=True) as console:
        console.say("hello")
        console.update(1, 1)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_time_left_that_ends_with_the_block(monkeypatch):
    screen = io.StringIO()
    with Console() as console:
        console._rich = module.RichConsole(file=screen, force_terminal=True, width=120)
        console.update(1, 4, ROW)
        console.update(2, 4)
        console.say("a sentence")
        bar = console._progress
        assert bar.live.is_started
    assert not bar.live.is_started
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "2/4" in text and "left" in text and "loss 1.235" in text and "a sentence" in text
