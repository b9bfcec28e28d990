import collections
import os
import pickle
import struct
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import each
from hypothesis import given
from hypothesis import strategies as st

from patchssl.runtime.errors import DataError
from patchssl.runtime.pickles import load_plain_pickle


def load(data: bytes, encoding: str = "latin1") -> Any:
    return load_plain_pickle(BytesIO(data), "a.pkl", encoding)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3) | st.tuples(inner, inner)
    ),
    max_leaves=10,
)


@given(PLAIN, st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_data_come_back_as_they_went(value, protocol):
    assert load(pickle.dumps(value, protocol)) == value


@each("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@each(
    "array",
    [
        np.arange(12, dtype=np.uint8).reshape(3, 4),
        np.arange(12, dtype=">i4").reshape(3, 4),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array([["a", "bcd"]]),
        np.array([True, False]),
        np.zeros((0, 5), dtype=np.int64),
        np.array(7),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_arrays_come_back_as_numpys_own(array, protocol):
    loaded = load(pickle.dumps({"x": [array, (array, 1)]}, protocol))["x"]
    assert type(loaded[0]) is np.ndarray
    assert loaded[0].dtype == array.dtype
    assert loaded[0].flags.writeable
    np.testing.assert_array_equal(loaded[0], array)
    assert loaded[0] is loaded[1][0]  # shared before, shared now


@each("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpys_numbers_sets_and_empty_bytes(protocol):
    value = {"f": np.float64(0.1), "i": np.int32(-5), "set": {1, 2}, "frozen": frozenset("ab"), "none": b""}
    loaded = load(pickle.dumps(value, protocol))
    assert loaded == value
    assert type(loaded["i"]) is np.int32


def python2_pickle_of_an_array(array: np.ndarray) -> bytes:
    """What Python 2 with numpy 1 wrote, as in the official CIFAR files: byte strings, numpy.core."""
    raw, shape = array.tobytes(), b"".join(b"K" + bytes([n]) for n in array.shape)
    return (
        b"\x80\x02}q\x00(U\x04dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00"
        b"\x85U\x01b\x87Rq\x04(K\x01" + shape + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<I", len(raw)) + raw + b"tb"
        b"U\x06labels]K\x07au."
    )  # fmt: skip


@pytest.mark.parametrize(
    ("encoding", "keys"), [("latin1", ["data", "labels"]), ("bytes", [b"data", b"labels"])]
)
def test_python_2_pickles(encoding, keys):
    array = np.arange(250, 256, dtype=np.uint8).reshape(2, 3)
    data = python2_pickle_of_an_array(array)
    loaded = load(data, encoding)
    assert list(loaded) == keys
    np.testing.assert_array_equal(loaded[keys[0]], array)
    assert loaded[keys[1]] == [7]
    np.testing.assert_array_equal(
        pickle.loads(data, encoding="latin1")["data"], array
    )  # the test's own bytes


class Calls:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@each("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_a_command_is_refused_and_runs_nothing(protocol, tmp_path):
    trace = tmp_path / "trace"
    for attack in (
        Calls(os.system, f"touch {trace}"),
        Calls(eval, f"open({str(trace)!r}, 'w')"),
        Calls(Path.touch, trace),
    ):
        data = pickle.dumps({"data": [attack]}, protocol)
        with pytest.raises(
            DataError, match=r"^a.pkl is refused: the pickle asks for .* nothing was executed"
        ):
            load(data)
        assert not trace.exists()
        pickle.loads(data)  # armed indeed
        assert trace.exists()
        trace.unlink()


def test_other_classes_are_refused_by_name():
    with pytest.raises(DataError, match=r"collections\.Counter"):
        load(pickle.dumps(collections.Counter("abc")))
    with pytest.raises(DataError, match=r"asks for numpy.*\.load"):
        load(pickle.dumps(Calls(np.load, "x.npy")))


def test_a_dotted_name_does_not_climb_out():
    data = b"\x80\x04\x8c\x08builtins\x8c\x14bytes.__subclasses__\x93)R."
    with pytest.raises(DataError, match=r"asks for builtins\.bytes\.__subclasses__"):
        load(data)


@each(
    "array", [np.array([{}, None]), np.zeros(2, dtype=[("a", "i4")]), np.array(["2020"], "M8[D]")]
)
def test_arrays_of_other_than_numbers_and_strings_are_refused(array):
    with pytest.raises(DataError, match=r"neither numbers nor strings|cannot be read"):
        load(pickle.dumps(array))


RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"
DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00u1\x85R"


@each(
    "data",
    [
        RECONSTRUCT + b"N}X\x0c\x00\x00\x00__defaults__K\x01s\x86b.",  # attributes of what makes arrays
        b"cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",  # of the stand-in for arrays
        DTYPE + b"}X\x05\x00\x00\x00dtypeX\x01\x00\x00\x00Osb.",  # of a data type
        RECONSTRUCT + b")R(K\x01K\x09\x85" + DTYPE + b"\x89C\x02abtb.",  # two bytes for nine numbers
        RECONSTRUCT + b")R(K\x01K\x02\x85X\x01\x00\x00\x00O\x89C\x02abtb.",  # a type that is no data type
        RECONSTRUCT + b")R.",  # an array without content
        # an array in a set, where it could not be replaced
        b"cbuiltins\nset\n(" + RECONSTRUCT + b")R(K\x01K\x01\x85" + DTYPE + b"\x89C\x01atbl\x85R.",
        DTYPE + b".",  # a data type as data
        b"cbuiltins\nset\n.",  # a class as data
        b"cbuiltins\nset\n}X\x01\x00\x00\x00aK\x01sb.",  # attributes of a builtin
    ],
)
def test_crafted_states_are_refused(data):
    for _ in range(2):  # and leave nothing behind
        with pytest.raises(DataError):
            load(b"\x80\x03" + data)
    assert load(pickle.dumps(np.arange(3))).tolist() == [0, 1, 2]


@each("data", [b"", b"hello", pickle.dumps([1, 2, 3])[:-4], b"\x80\x09."])
def test_damaged_pickles_are_refused_with_their_name(data):
    with pytest.raises(DataError, match=r"^a.pkl cannot be read as a pickle: "):
        load(data)


def test_a_container_in_itself_is_refused():
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises(DataError, match="recursion"):
        load(pickle.dumps(circle))


def doubled(times: int, start: Any = 1) -> Any:
    """A value of 2 ** times parts, were each copied."""
    value = start
    for _ in range(times):
        value = (value, value)
    return value


@each(("data", "words"), [
    (b"\x80\x02Nr\xff\xff\xff\x3f.", "keeps a value under the number 1,073,741,823, after 2 steps"),
    (b"Np999999999\n.", "keeps a value under the number 999,999,999"),
    (b"Np-1\n.", "keeps a value under the number -1"),
    (b"j\xff\xff\xff\x3f.", "takes what it has not put there"),
    (b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.", "expected 1099511627776 bytes"),
    (pickle.dumps({"imlist": doubled(30)}), "more than .* values"),
    (b"}N" + b"2\x86" * 30 + b"Ns.", "more than .* values"),  # a key whose hash takes minutes
    (b"N" + b"\x85" * 100_000 + b"}\x940h\x00.", "more than 32 deep"),  # whose hash overflows the stack
    (b"]\x94]\x94" + b"h\x00h\x00\x86ah\x00Na.", "part of another already"),
])
def test_few_bytes_that_ask_for_much(data, words):
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=words) as caught:
            load(data)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 400


def test_a_program_of_many_steps(monkeypatch):
    monkeypatch.setattr("patchssl.runtime.pickles.MOST_STEPS", 1000)
    assert load(b"N0" * 499 + b"N.") is None
    with pytest.raises(DataError, match="more than 1,000 steps"):
        load(b"N0" * 501 + b"N.")


def test_references_that_do_not_multiply_are_kept_shared():
    loaded = load(pickle.dumps(doubled(5, [1])))
    assert loaded[0] is loaded[1]
    names = ("a", "b", "c")
    assert load(pickle.dumps([[names] * 1000, "a" * 10])) == [[names] * 1000, "a" * 10]


def test_a_long_name_is_cut():
    with pytest.raises(DataError) as caught:
        load(b"c" + b"x" * 100_000 + b"\ny\n.")
    assert len(str(caught.value)) < 400
