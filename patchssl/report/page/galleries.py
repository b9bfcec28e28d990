"""The galleries in records, read as files that anyone may have written: what fits is kept, what does not is named."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.dataclasses import dataclass as checked

from patchssl.eval.galleries import BEST, ROLES, WORST
from patchssl.eval.naming import fault_of, leads_out
from patchssl.eval.records import Fraction, Result
from patchssl.runtime.errors import DataError

_STRICT = ConfigDict(extra="ignore", strict=True)
_MOST_QUERIES, _MOST_IMAGES = 64, 64
_LEVELS = ("strong", "medium", "hard")  # shown in this order
Rank = Annotated[int, Field(ge=1, lt=10**10)]


@checked(frozen=True, kw_only=True, config=_STRICT)
class Named:
    """An image file: name relative to its folder, and its bytes where it was scored."""

    name: str
    bytes: Annotated[int, Field(ge=0)] | None = None

    @field_validator("name")
    @classmethod
    def _inside(cls, name: str) -> str:
        if fault := fault_of(name):
            raise ValueError(f"the name of an image {fault}")
        if not name or leads_out(name):
            raise ValueError(f"{name!r} is a path that leads out of the images' folder")
        return name


@checked(frozen=True, kw_only=True, config=_STRICT)
class SearchHit(Named):
    """One of a query's first results."""

    role: str

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"{role[:40]!r} is none of {', '.join(ROLES)}")
        return role


@checked(frozen=True, kw_only=True, config=_STRICT)
class Late(Named):
    """A positive behind the first results."""

    rank: Rank


@checked(frozen=True, kw_only=True, config=_STRICT)
class Query:
    """A query, its AP, and what was found first."""

    query: Named
    ap: Fraction
    end: str
    num_positives: Annotated[int, Field(ge=1)]
    results: Annotated[list[SearchHit], Field(max_length=_MOST_IMAGES)]
    late: Annotated[list[Late], Field(max_length=_MOST_IMAGES)]

    @field_validator("end")
    @classmethod
    def _known(cls, end: str) -> str:
        if end not in (WORST, BEST):
            raise ValueError(f"{end[:40]!r} is neither {WORST} nor {BEST}")
        return end


@dataclass(frozen=True)
class Gallery:
    """The worst and the best queries of a record on one level."""

    record: Result
    level: str
    worst: tuple[Query, ...]
    best: tuple[Query, ...]

    def images(self) -> Iterator[Named]:
        """All that are shown, some of them more than once."""
        for query in (*self.worst, *self.best):
            yield from (query.query, *query.results, *query.late)


_QUERIES = TypeAdapter(Annotated[list[Query], Field(max_length=_MOST_QUERIES)])


def galleries_of(record: Result) -> list[Gallery]:
    """The galleries in `record`, the easier level first; DataError says what is wrong with them."""
    kept: Any = record.detail.get("galleries")
    if kept is None:
        return []
    if not isinstance(kept, Mapping) or len(kept) > len(record.metrics):
        raise DataError("its galleries are no table by level")
    found = []
    for level, queries in sorted(kept.items(), key=lambda item: [item[0] != name for name in _LEVELS]):
        if f"{level}/map" not in record.metrics:
            raise DataError(f"it has a gallery of {level[:40]!r}, but no mAP there")
        try:
            read = _QUERIES.validate_json(json.dumps(queries))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            fault = ": ".join([".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")])
            raise DataError(f"its gallery of {level} is not valid: {fault}") from None
        except RecursionError:
            raise DataError(f"its gallery of {level} is nested too deeply") from None
        found.append(Gallery(record, level, *(tuple(query for query in read if query.end == end)
                                              for end in (WORST, BEST))))
    return found
