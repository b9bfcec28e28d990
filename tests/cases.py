"""Many rows of one property as one test."""

import functools
import inspect

import pytest


def each(names, rows, ids=None):
    """Like `pytest.mark.parametrize`, but one test: it tries every row, and says of each that fails which it is.

    A row gets a `tmp_path` and a `monkeypatch` of its own; the other fixtures are shared by all rows. Of two
    decorators on a test every combination is tried.
    """
    names = names.replace(",", " ").split() if isinstance(names, str) else names
    rows = [dict(zip(names, [row] if len(names) == 1 else row, strict=True)) for row in rows]
    if callable(ids):
        ids = ["-".join(str(ids(value)) for value in row.values()) for row in rows]
    labeled = list(zip([str(label)[:200] for label in ids or rows], rows, strict=True))

    def decorate(decorated):
        test, others = getattr(decorated, "rows", (decorated, [("", {})]))
        every = [(f"{label} {word}".rstrip(), row | other) for label, row in labeled for word, other in others]
        wanted = inspect.signature(test).parameters

        @functools.wraps(decorated)
        def run(subtests, **fixtures):
            for number, (label, row) in enumerate(every):
                with subtests.test(label), pytest.MonkeyPatch.context() as patch:
                    given = {**fixtures, **row, "monkeypatch": patch}
                    if "tmp_path" in wanted:
                        given["tmp_path"] = fixtures["tmp_path"] / f"row{number}"
                        given["tmp_path"].mkdir()
                    test(**{name: given[name] for name in wanted})

        shared = [wanted[name] for name in wanted if name not in every[0][1]]
        run.rows = test, every
        run.__signature__ = inspect.Signature(
            [inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD), *shared])
        return run

    return decorate
