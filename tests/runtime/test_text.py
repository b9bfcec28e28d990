"""Commands that are printed can be pasted into a shell."""

import re
import shlex
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from patchssl.runtime.text import command, resume_command

PACKAGE = Path(__file__).parents[2] / "patchssl"
TEMPLATES = {"report/reproduce.py"}  # ROOT and MODEL are filled in by words of its own


@given(st.text(st.characters(exclude_characters="\0"), min_size=1))
def test_a_shell_takes_the_command_apart_into_the_words_it_was_made_of(folder):
    assert shlex.split(command("eval", "knn", folder)) == ["patchssl", "eval", "knn", folder]
    assert shlex.split(resume_command(folder)) == ["patchssl", "pretrain", "--resume", folder]


def test_no_message_puts_a_value_into_a_command_unquoted():
    values = re.compile(r"patchssl (?:pretrain|eval|data|plot|study|tables|report|export|inspect)\b[^\"'`]*\{")
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if values.search(path.read_text())}
    assert found <= TEMPLATES
