"""The page on the Python interface runs from top to bottom."""

import re
from pathlib import Path

import pytest

import patchssl

PAGE = Path(__file__).parents[1] / "results" / "python_api.md"


@pytest.mark.slow
def test_the_page_runs_as_one_session(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATCHSSL_CACHE", str(tmp_path / "cache"))
    text = PAGE.read_text("utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", text, re.DOTALL))
    assert len(blocks) == 7
    session: dict = {}
    for block in blocks:
        above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * above + block[1], str(PAGE), "exec"), session)  # errors name the line of the page
    assert "position/exact" in capsys.readouterr().out
    assert (tmp_path / "results" / "table.md").is_file() and (tmp_path / "attention.png").is_file()


def test_the_names_it_promises_are_there():
    promised = PAGE.read_text("utf-8").rpartition("Promised to stay:")[2]
    names = re.findall(r"`(patchssl\.[\w.]+)`", promised)
    assert len(names) >= 9
    for name in names:
        found = patchssl
        for part in name.split(".")[1:]:
            __import__(found.__name__)
            try:
                found = getattr(found, part)
            except AttributeError:
                found = __import__(f"{found.__name__}.{part}", fromlist=[part])
        assert callable(found)
