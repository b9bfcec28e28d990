"""Damaged and made-up input, and what a reader may do with it: a sentence, in time and in little memory."""

import copy
import json
import resource
import signal
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from patchssl.runtime.errors import PatchSSLError

SECONDS, BYTES = 10, 2**30
VALUES = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    float("inf"),
    "",
    "x" * 3000,
    "\x1b[31m\u202e",
    "../../etc",
    "\udcff",
    [],
    {},
    [[[[]]]],
    {"a": {"b": {"c": []}}},
    ["x"] * 500,
]


def many(count):
    """The same `count` inputs in every run."""
    return settings(
        max_examples=count,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def bounded():
    """Inside, what takes ten seconds or a GiB more than before fails; of errors the sentences for users pass."""

    def late(number, frame):
        raise TimeoutError(f"more than {SECONDS} s")

    before, peak = signal.signal(signal.SIGALRM, late), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    except PatchSSLError as error:
        assert 0 < len(str(error)) < 20_000
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
    assert grown < BYTES, f"{grown / 2**20:.0f} MiB more"


def damaged(content):
    """Strategy of `content` (bytes) with bytes changed, put in, cut off or repeated in one to four places."""
    place = st.integers(0, max(0, len(content) - 1))
    change = st.tuples(
        st.sampled_from(["change", "insert", "cut", "repeat", "fill"]), place, st.binary(min_size=1, max_size=12)
    )
    return st.lists(change, min_size=1, max_size=4).map(lambda changes: _changed(content, changes))


def _changed(content, changes):
    for kind, at, more in changes:
        if kind == "change":
            content = content[:at] + more + content[at + len(more) :]
        elif kind == "insert":
            content = content[:at] + more + content[at:]
        elif kind == "cut":
            content = content[:at]
        elif kind == "repeat":
            content += content[at : at + 64 * len(more)]
        else:
            content = content[:at] + more[:1] * 8 + content[at + 8 :]
    return content


def altered(values):
    """Strategy of plain `values` with one to three entries, anywhere, dropped or replaced by an odd value."""
    change = st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=4), st.sampled_from([*VALUES, "drop"]))
    return st.lists(change, min_size=1, max_size=3).map(lambda changes: _altered(values, changes))


def _altered(values, changes):
    values = copy.deepcopy(values)
    for steps, new in changes:
        part = values
        for step in steps:
            keys = list(part) if isinstance(part, dict) else range(len(part))
            if not keys:
                break
            key = keys[step % len(keys)]
            if step == steps[-1] or not isinstance(part[key], dict | list) or not part[key]:
                if new == "drop":
                    del part[key]
                else:
                    part[key] = copy.deepcopy(new)
                break
            part = part[key]
    return values


def as_json(values):
    """JSON of `values`; infinity is written as Python does."""
    return json.dumps(values).encode()
