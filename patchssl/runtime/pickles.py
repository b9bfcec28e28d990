"""Pickles that hold data only: containers, numbers, strings, bytes and numpy arrays, and nothing that runs.

A pickle is a program: it names functions and calls them. Here the few names that stored data need lead to the
stand-ins below, and every other name is refused before anything is called. Not even numpy's own functions are
handed out: a crafted data type can make numpy read memory that is not its own. And a few bytes can ask for more than
fits into memory, so that what a pickle builds is counted before it is built.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

from patchssl.runtime.errors import DataError
from patchssl.runtime.text import cut

MOST_STEPS = 5_000_000  # of the program that a pickle is; CIFAR's largest have 200,000
MOST_DEPTH = 32  # containers in one another
MOST_SHOWN = 300  # letters of a reason
_USUAL_PARTS, _PARTS_A_BYTE = 1000, 16  # values, those that are shared counted wherever they stand


def load_plain_pickle(file: BinaryIO, name: str, encoding: str = "latin1") -> Any:
    """The data in a pickle of any protocol, Python 2's included; `name` is what errors call it.

    `encoding` is what Python 2's strings are read as. DataError for a pickle that is damaged or asks for
    anything but plain data, or for more of it than its bytes can mean; nothing it asks for is executed.
    """
    data = file.read()
    try:
        require_bounded(BytesIO(data), len(data))
        return _settle(_PlainUnpickler(BytesIO(data), encoding=encoding).load(), {})
    except DataError as error:
        raise DataError(f"{name} is refused: {cut(str(error) or type(error).__name__, MOST_SHOWN)}") from None
    except MemoryError:
        raise
    except LookupError as error:
        raise DataError(f"{name} cannot be read as a pickle: it takes what it has not put there") from error
    except Exception as error:  # a damaged pickle makes the unpickler raise anything
        reason = cut(str(error) or type(error).__name__, MOST_SHOWN)
        raise DataError(f"{name} cannot be read as a pickle: {reason}") from error


@dataclass(slots=True)
class _Part:
    """What a step of a pickle leaves: how many values, how deep in one another, and is it in something else?"""

    values: int = 1
    depth: int = 0
    inside: bool = False


def require_bounded(file: BinaryIO, size: int) -> None:
    """DataError for a pickle of at most `size` bytes whose steps, none of which is taken, make too much of them.

    Tuples within tuples that are taken from the memo double with every step, and so does the time to hash them.
    """
    stack: list[_Part | None] = []  # None: a mark
    memo: dict[int, _Part | None] = {}
    most = _USUAL_PARTS + _PARTS_A_BYTE * size
    for count, (step, argument) in enumerate(_steps(file)):
        if count > MOST_STEPS:
            raise DataError(f"the pickle has more than {MOST_STEPS:,} steps, which no data that are read here need")
        if "PUT" in step.name or step.name == "MEMOIZE":
            index = len(memo) if argument is None else int(argument)
            if not 0 <= index <= count:
                raise DataError(f"the pickle keeps a value under the number {index:,}, after {count:,} steps")
            memo[index] = stack[-1]
        elif step.name.endswith("GET"):
            stack.append(memo[int(argument)])
        elif step.name == "MARK":
            stack.append(None)
        elif step.name == "DUP":
            stack.append(stack[-1])
        elif step.name == "POP":
            stack.pop()
        else:
            _take(step, stack, most)


def _take(step: pickletools.OpcodeInfo, stack: list[_Part | None], most: int) -> None:
    """What `step` takes from the `stack` and puts there; DataError for more than `most` values."""
    before = len(step.stack_before)
    parts = []
    if pickletools.markobject in step.stack_before:
        while (part := stack.pop()) is not None:
            parts.append(part)
        before = step.stack_before.index(pickletools.markobject)
    parts += [part for part in (stack.pop() for _ in range(before)) if part is not None]
    if not step.stack_after:
        return
    made = _Part()
    if step.name in {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}:
        made = parts.pop()
        if made.inside and parts:
            raise DataError("the pickle changes a value that is part of another already")
    for part in parts:
        part.inside = True
        made.values += part.values
        made.depth = max(made.depth, part.depth + 1)
    if made.values > most:
        raise DataError(f"the pickle repeats what it holds so often that it would be more than {most:,} values")
    if made.depth > MOST_DEPTH:
        raise DataError(f"the pickle has containers more than {MOST_DEPTH} deep in one another")
    stack.append(made)


def _steps(file: BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """As pickletools.genops, which takes no text of Python 2 but ASCII; ValueError for what is no step."""
    stopped = False
    while not stopped:
        code = file.read(1)
        if not code:
            raise ValueError("it ends early")
        if (step := pickletools.code2op.get(code.decode("latin1"))) is None:  # type: ignore[attr-defined]
            raise ValueError(f"byte {file.tell() - 1:,} is no step of a pickle")
        argument = None
        if step.arg is not None:
            argument = file.readline() if step.name == "STRING" else step.arg.reader(file)
        yield step, argument
        stopped = step.name == "STOP"


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        where = module.replace("numpy.core", "numpy._core").replace("__builtin__", "builtins")
        if (found := _STAND_INS.get((where, name))) is None:
            raise DataError(
                f"the pickle asks for {module}.{name}; only plain containers, numbers, strings, bytes and "
                "numpy arrays are read, and nothing was executed"
            )
        return found


class _Locked:
    """Base of the stand-ins: no attributes but slots, as a pickle may set the attributes of what it gets."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise DataError(f"the pickle sets the state of a {type(self).__name__}")


class _DType(_Locked):
    """numpy.dtype of plain numbers or strings."""

    __slots__ = ("dtype",)

    def __init__(self, code: str | bytes, align: object = False, copy: object = True) -> None:
        self.dtype = np.dtype(code.decode("ascii") if isinstance(code, bytes) else str(code))
        if self.dtype.kind not in "biufcSU" or self.dtype.subdtype is not None:
            raise DataError(
                f"the pickle holds an array of {self.dtype}, which is neither numbers nor strings"
            )

    def __setstate__(self, state: Any) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(_Locked):
    """numpy.ndarray, until `_settle` puts the real one in its place."""

    __slots__ = ("value",)
    __hash__ = None  # type: ignore[assignment]  # in a set it would stay a stand-in

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.value = _array(raw, kind, shape, "F" if fortran else "C")


class _Reconstruct(_Locked):
    """numpy's function that makes an array without content."""

    def __new__(cls, *_: object) -> Any:
        return _Array()


class _FromBuffer(_Locked):
    """numpy's function that makes an array, since pickle protocol 5."""

    def __new__(cls, raw: Any, kind: Any, shape: Any, order: Any) -> Any:
        array = _Array()
        array.value = _array(raw, kind, shape, order)
        return array


class _Scalar(_Locked):
    """numpy's function that makes a number of one of its types."""

    def __new__(cls, kind: Any, raw: Any) -> Any:
        return _array(raw, kind, (1,), "C")[0]


class _Encode(_Locked):
    """codecs.encode, with which protocols 0 to 2 write bytes."""

    def __new__(cls, text: str, encoding: str = "latin1") -> Any:
        return text.encode("latin1")


class _Bytes(_Locked):
    """bytes, asked for without arguments where there are none."""

    def __new__(cls) -> Any:
        return b""


_STAND_INS: dict[tuple[str, str], type] = {
    ("numpy", "dtype"): _DType,
    ("numpy", "ndarray"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Reconstruct,
    ("numpy._core.multiarray", "scalar"): _Scalar,
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer,
    ("_codecs", "encode"): _Encode,
    ("builtins", "bytes"): _Bytes,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}

# for another reader of pickles: what single numbers of numpy need, by the names that pickles write
NUMBERS: Mapping[str, type] = {"numpy.dtype": _DType, "numpy.core.multiarray.scalar": _Scalar,
                               "numpy._core.multiarray.scalar": _Scalar}


def _array(raw: Any, kind: Any, shape: Any, order: Any) -> np.ndarray:
    """A writable array of the bytes `raw`; numpy checks that they fill the shape."""
    content = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    if not isinstance(kind, _DType):
        raise DataError("the pickle holds an array without a data type")
    return np.frombuffer(content, kind.dtype).reshape(shape, order=order).copy(order)


def _settle(value: Any, done: dict[int, Any]) -> Any:
    """`value` with the real arrays in place; `done` keeps what is shared shared."""
    if id(value) not in done:
        settled = value
        if isinstance(value, _Array):
            settled = value.value
        elif isinstance(value, dict):
            settled = {_settle(key, done): _settle(item, done) for key, item in value.items()}
        elif isinstance(value, (list, tuple)):
            settled = type(value)([_settle(item, done) for item in value])
        elif isinstance(value, (_Locked, type)):
            raise DataError("the pickle holds a type, which is no data")
        done[id(value)] = settled
    return done[id(value)]
