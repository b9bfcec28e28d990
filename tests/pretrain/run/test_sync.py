"""What processes agree on, from what each of them says."""

import pytest

from patchssl.pretrain.run import sync
from patchssl.pretrain.run.sync import Decision, LocalStatus, RankSync

NOTHING = LocalStatus(None, {}, False, False, 0.5)


@pytest.fixture
def three(monkeypatch):
    """Two more processes, which say what the test puts here; this one is rank 0."""
    others = [NOTHING, NOTHING]
    monkeypatch.setattr(sync, "all_gather_objects", lambda own: [own, *others])
    monkeypatch.setattr(sync, "world_size", lambda: 3)
    return others


def test_alone_there_is_a_meeting_after_every_update():
    meetings = RankSync(5.0)
    for step in range(1, 4):
        assert meetings.due(step)
        assert meetings.hold(step, NOTHING._replace(signal=15, log_due=True)) == Decision(15, {}, True, False)


def test_anybodys_signal_and_images_count_and_the_time_of_rank_0(three):
    three[1] = LocalStatus(10, {"b.jpg": "cut off"}, True, True, 99.0)
    found = RankSync(5.0).hold(7, NOTHING._replace(unreadable={"a.jpg": ""}, save_due=True))
    assert found == Decision(10, {"a.jpg": "", "b.jpg": "cut off"}, False, True)


@pytest.mark.parametrize(("log_seconds", "pace", "steps"), [(2.0, 0.5, 4), (60.0, 0.5, 10), (5.0, 30.0, 1)])
def test_the_next_meeting_is_about_a_log_row_away_and_never_far(three, log_seconds, pace, steps):
    meetings = RankSync(log_seconds)
    meetings.hold(7, NOTHING._replace(seconds_per_step=pace))
    assert [meetings.due(step) for step in (7 + steps - 1, 7 + steps)] == [False, True]
