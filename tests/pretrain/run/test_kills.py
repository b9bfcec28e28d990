"""A run that is killed again and again ends as one that nobody disturbs; `killing.py` does it 25 times."""

import pytest
from killing import describe, differing, finish, kill_and_resume

pytestmark = pytest.mark.slow

KILLS, EPOCHS = 4, 60


def test_a_few_kills_at_random_moments(tmp_path):
    left = kill_and_resume(tmp_path / "killed", KILLS, EPOCHS, seed=1)
    assert left.total() == KILLS
    finish(tmp_path / "whole", EPOCHS)
    assert differing(tmp_path / "whole", tmp_path / "killed") == []


def test_other_weights_are_noticed(tmp_path):
    """What the comparison is worth: two runs of unlike length differ."""
    for epochs in (2, 3):
        finish(tmp_path / str(epochs), epochs)
    assert any("student" in name for name in differing(tmp_path / "2", tmp_path / "3"))
    assert describe(tmp_path / "2") == "whole"
