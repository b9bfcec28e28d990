"""Frames of text as Markdown, LaTeX and CSV.

A frame's footnotes are in `frame.attrs["notes"]`, the (row, column) numbers of its bold cells in `frame.attrs["bold"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pandas as pd

NAMED = 3  # method, architecture, pretraining are words
_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "†": r"\dag{}", "‡": r"\ddag{}", "–": "--"}


def to_markdown(frame: pd.DataFrame) -> str:
    """A padded pipe table, numbers to the right, and the frame's notes below it."""
    header, *body = _cells(frame, _escape, "**{}**")
    widths = [max(3, *(len(row[i]) for row in [header, *body])) for i in range(len(header))]
    named = min(NAMED, len(header))
    rule = ["-" * width if i < named else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [_line(header, widths, named), "| " + " | ".join(rule) + " |",
             *(_line(row, widths, named) for row in body)]
    notes = [f"- {_escape(note)}" for note in frame.attrs.get("notes", [])]
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def to_latex(frame: pd.DataFrame, caption: str) -> str:
    """A `table` for LaTeX with the package booktabs, the frame's notes below it."""
    header, *body = (" & ".join(row) + r" \\" for row in _cells(frame, tex, r"\textbf{{{}}}"))
    columns = len(frame.columns)
    notes = [rf"\item {tex(note)}" for note in frame.attrs.get("notes", [])]
    return "\n".join([
        r"\begin{table}", rf"\caption{{{tex(caption)}}}",
        rf"\begin{{tabular}}{{{'l' * min(NAMED, columns)}{'r' * max(0, columns - NAMED)}}}",
        r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
        *([r"\begin{itemize}", *notes, r"\end{itemize}"] if notes else []), r"\end{table}",
    ]) + "\n"


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV with a header and line feeds; numbers have four decimals at most."""
    return str(frame.to_csv(index=False, lineterminator="\n", na_rep=""))


def tex(text: str) -> str:
    r"""Text that LaTeX prints as it is.

    >>> tex("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return " ".join("".join(_TEX.get(letter, letter) for letter in text).split())


def _cells(frame: pd.DataFrame, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    """Header and rows, escaped, and the bold cells marked."""
    marked = set(frame.attrs.get("bold", ()))
    body = [[bold.format(escape(str(cell))) if (i, j) in marked else escape(str(cell)) for j, cell in enumerate(row)]
            for i, row in enumerate(frame.itertuples(index=False))]
    return [[escape(str(name)) for name in frame.columns], *body]


def _line(cells: Sequence[str], widths: Sequence[int], named: int) -> str:
    padded = [cell.ljust(width) if i < named else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(padded) + " |"


def _escape(text: str) -> str:
    """Text that cannot break out of a Markdown cell."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").split())
