"""Commands that are printed can be pasted into a shell."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from patchssl.data.open import open_images
from patchssl.models.load import load_backbone
from patchssl.runtime.errors import UsageError
from patchssl.runtime.text import command, resume_command

PACKAGE = Path(__file__).parents[2] / "patchssl"
TEMPLATES = {"report/reproduce.py"}  # ROOT and MODEL are filled in by words of its own


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["C", "Z"]) | st.just(" "), min_size=1))
def test_a_shell_takes_the_command_apart_into_the_words_it_was_made_of(folder):
    assert shlex.split(command("eval", "knn", folder)) == ["patchssl", "eval", "knn", folder]
    assert shlex.split(resume_command(folder)) == ["patchssl", "pretrain", "--resume", folder]


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"\x1b[31m'x\\", b"\xc2\xa0\xe2\x80\xae$HOME", b"it's \xff`id`",
                                  b"x"])
def test_what_cannot_be_printed_comes_back_from_a_shell(name):
    said = command("inspect", os.fsdecode(name))
    assert said.isprintable()
    script = f"patchssl() {{ printf '%s' \"$2\"; }}; {said}"
    done = subprocess.run(["bash", "-c", script], check=True, capture_output=True, timeout=60)
    assert done.stdout == name


def test_no_message_puts_a_value_into_a_command_unquoted():
    values = re.compile(r"patchssl (?:pretrain|eval|data|plot|study|tables|report|export|inspect)\b[^\"'`]*\{")
    found = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if values.search(path.read_text())}
    assert found <= TEMPLATES


@pytest.mark.parametrize(("open_it", "uri"), [
    (open_images, "hf:me/set?image=a&image=b"), (open_images, "timm:torch/cifar10?root=a&root=b"),
    (load_backbone, "pixels?img_size=32&img_size=64"), (load_backbone, "random:vit_tiny_patch16_224?seed=1&seed=2"),
    (load_backbone, "timm:resnet18?img_size=32&img_size=64"),
])
def test_an_option_twice_behind_a_name_is_refused(open_it, uri):
    with pytest.raises(UsageError, match=r"(image|root|img_size|seed)= stands twice; keep one"):
        open_it(uri)


def test_columns_named_twice_behind_a_path(tmp_path):
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UsageError, match="image= stands twice"):
        open_images(f"{tmp_path}/x.parquet?image=a&image=b")
