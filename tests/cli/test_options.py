"""Options by their old names: kept for one release, hidden, with a warning that names the new one."""

from types import SimpleNamespace

import pytest

# command -> old name, new name, their value, and the function that gets it: its place or its keyword
OLD = {
    "export runs/x": ("--to", "--out", "there", "patchssl.export.folder.export_and_push", 1),
    "plot pca runs/a photo.jpg": ("--beside", "--compare", "runs/b", "patchssl.report.figures.draw.draw_pca", 0),
    "plot study studies/x": ("--beside", "--compare", "pwself", "patchssl.study.figure.draw_study", 2),
    "compare one two": ("--moved", "--num-changes", "7", "patchssl.report.tables.compare.compare", "num_moved"),
    "study textures --dry-run": ("--seed", "--only-seed", "3", "patchssl.study.command.ask", "seeds"),
}

ANSWER = SimpleNamespace(as_text=lambda: "answer", text=lambda: "answer")


@pytest.fixture(params=OLD)
def case(request, monkeypatch):
    """A command that has an option with an old name, and what its function was given, at last."""
    old, new, value, function, place = OLD[request.param]
    given = []

    def fake(*args, **kwargs):
        given.append(kwargs[place] if isinstance(place, str) else args[place])
        return ANSWER

    monkeypatch.setattr(function, fake)
    monkeypatch.setattr("patchssl.report.tables.compare.find_records",
                        lambda *_: SimpleNamespace(records=[], problems=[]))
    monkeypatch.setattr("patchssl.study.command.plan", lambda asked, console: (asked, asked))
    return SimpleNamespace(command=request.param.split(), old=old, new=new, value=value, given=given)


@pytest.mark.parametrize("joined", [False, True], ids=["NAME VALUE", "NAME=VALUE"])
def test_an_old_name_does_as_the_new_one_and_warns(patchssl, case, joined):
    new, old = (patchssl(*case.command, *([f"{name}={case.value}"] if joined else [name, case.value]))
                for name in (case.new, case.old))
    assert (new.code, old.code, new.err) == (0, 0, ""), old.err
    assert case.given[0] == case.given[1] and case.value in str(case.given[0])
    assert old.out == new.out
    assert old.err == f"warning: {case.old} is now {case.new}; the old name goes with the next release\n"


def test_an_old_name_is_in_no_help(patchssl, case):
    answer = patchssl(*case.command, "--help")
    assert f"{case.new} " in answer.out and f"{case.old} " not in answer.out


def test_both_names_are_refused(patchssl, case):
    answer = patchssl(*case.command, case.new, case.value, f"{case.old}={case.value}")
    assert (answer.code, answer.out, case.given) == (2, "", [])
    assert answer.err == f"patchssl: {case.old} is the old name of {case.new}; give {case.new} alone\n"


def test_a_missing_option_is_asked_for_by_its_new_name(patchssl):
    answer = patchssl("export", "runs/x")
    assert answer.code == 2 and "'--out'" in answer.err


def test_what_stands_behind_two_dashes_is_no_option(patchssl):
    answer = patchssl("compare", "--results", "nowhere", "--", "--moved", "two")
    assert answer.code != 0 and "warning" not in answer.err and "--moved" in answer.err
