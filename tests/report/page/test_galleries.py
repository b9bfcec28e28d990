"""Galleries read from records: what fits is kept, what does not is named."""

import copy

import pytest
from cases import each
from made_results import made_up_records, with_gallery

from patchssl.report.page.galleries import galleries_of
from patchssl.runtime.errors import DataError

RECORD = next(with_gallery(record, 9) for record in made_up_records(20) if record.task == "roxford5k")


def changed(place, value):
    """The record with what is at `place` of its galleries replaced, all of them by default."""
    record = copy.deepcopy(RECORD)
    *way, last = ("galleries", *place)
    inner = record.detail
    for key in way:
        inner = inner[key]
    inner[last] = value
    return record


def test_worst_and_best_queries_are_told_apart():
    (gallery,) = galleries_of(RECORD)
    assert gallery.level == "medium" and gallery.record is RECORD
    assert [query.end for query in (*gallery.worst, *gallery.best)] == ["worst"] * 8 + ["best"] * 8
    first = RECORD.detail["galleries"]["medium"][0]
    assert gallery.worst[0].query.name == first["query"]["name"]
    assert [found.role for found in gallery.worst[0].results] == [found["role"] for found in first["results"]]


def test_a_record_without_galleries_has_none():
    assert galleries_of(next(made_up_records(1))) == []


@each(("place", "value", "reason"), [
    ((), [], "no table by level"),
    (("hard",), [], "no table by level"),
    (("medium",), "x", "medium is not valid"),
    (("medium", 0), 3, "medium is not valid: 0"),
    (("medium", 0, "ap"), 1.5, "0.ap"),
    (("medium", 0, "ap"), "0.5", "0.ap"),
    (("medium", 0, "ap"), float("nan"), "0.ap"),
    (("medium", 0, "end"), "<b>", "0.end"),
    (("medium", 0, "query"), {"name": "../../etc/passwd"}, "leads out of the images' folder"),
    (("medium", 0, "query"), {"name": "/etc/passwd"}, "leads out of the images' folder"),
    (("medium", 0, "query"), {"name": "<script>.jpg"}, "holds HTML"),
    (("medium", 0, "query"), {"name": "x" * 9999}, "9,999 characters"),
    (("medium", 0, "query"), {"name": "a.jpg", "bytes": -1}, "0.query.bytes"),
    (("medium", 1, "results", 2), {"name": "a\u202e.jpg", "role": "error"}, "1.results.2.name"),
    (("medium", 1, "results", 2, "role"), "winner", "1.results.2.role"),
    (("medium", 1, "late", 0, "rank"), 0, "1.late.0.rank"),
    (("medium", 1, "results"), [{"name": "a", "role": "error"}] * 1000, "1.results"),
])
def test_what_does_not_fit_is_named(place, value, reason):
    with pytest.raises(DataError, match=reason):
        galleries_of(changed(place, value))


def test_a_level_without_a_score_is_refused():
    record = copy.deepcopy(RECORD)
    record.detail["galleries"] = {"hard": record.detail["galleries"]["medium"]}
    with pytest.raises(DataError, match="no mAP"):
        galleries_of(record)
