"""The errors a user can meet, each with the exit code the command line answers with.

    PatchSSLError          1  something failed, the sentence says what to do
    +-- UsageError         2  the command, the recipe or an argument is wrong
    +-- NotFiniteError     3  the loss is not finite
    +-- DataError          4  images or datasets that cannot be used
    |   +-- UnreadableImage    one image that cannot be decoded
    +-- FolderInUse        1  another process writes where this one was to
    +-- CheckpointError    1  weights that are missing, damaged or of another network
    +-- Interrupted      130  Ctrl-C (75 on another signal); what was done is saved

Every message says what was asked, what is there and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from pathlib import Path


class PatchSSLError(Exception):
    """Base of all errors that are meant for the user; the message is a whole sentence."""

    exit_code = 1


class UsageError(PatchSSLError):
    """The command, the recipe or an argument is wrong."""

    exit_code = 2


class NotFiniteError(PatchSSLError):
    """The training loss became infinite or not a number."""

    exit_code = 3


class DataError(PatchSSLError):
    """Images or a dataset that cannot be used as asked."""

    exit_code = 4


class UnreadableImage(DataError):
    """One image that cannot be decoded; `reason` is the decoder's own word."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImage], tuple[str, str]]:
        """As it was made: exceptions cross from a worker process by pickling."""
        return type(self), (self.name, self.reason)


class CheckpointError(PatchSSLError):
    """A checkpoint or weights file that is missing, damaged or does not fit."""


class FolderInUse(PatchSSLError):
    """Another process, the `owner` in words, writes to `folder`; `remedy` says what to do."""

    def __init__(self, folder: Path, owner: str, remedy: str) -> None:
        super().__init__(f"{folder} is in use by {owner}; {remedy}")
        self.folder, self.owner, self.remedy = folder, owner, remedy

    def __reduce__(self) -> tuple[type[FolderInUse], tuple[Path, str, str]]:
        """As it was made: processes of one run tell each other."""
        return type(self), (self.folder, self.owner, self.remedy)


class Interrupted(PatchSSLError):
    """A run was stopped by the signal `number` after saving; `exit_code` is 130 for Ctrl-C and 75 otherwise."""

    def __init__(self, message: str, exit_code: int = 130, number: int | None = None) -> None:
        super().__init__(message)
        self.exit_code, self.number = exit_code, number


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what it arose from, one after the other."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def printable(text: str) -> str:
    r"""`text` without what moves the cursor of a terminal or turns the order of letters: names come from files.

    >>> printable("cat\x1b[31m")
    'cat?[31m'
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def unknown_choice(what: str, asked: str, choices: Iterable[str]) -> str:
    """Sentence for a wrong choice: what was asked, the nearest right one, all right ones.

    >>> one_of("rule", "centre", ["center", "paper"])
    "rule 'centre' is unknown; did you mean 'center'? Choose one of: center, paper"
    """
    names = sorted(choices)
    near = difflib.get_close_matches(asked, names, n=1)
    hint = f"; did you mean '{near[0]}'? " if near else "; "
    if len(names) > 20:
        rest = f"{len(names)} can be chosen, for example {names[0]}"
    else:
        rest = f"{'Choose' if near else 'choose'} one of: {', '.join(names)}"
    return f"{what} '{asked}' is unknown{hint}{rest}"
