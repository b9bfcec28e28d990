"""Frames of text as Markdown, LaTeX and CSV.

A frame's footnotes are in `frame.attrs["notes"]`, the (row, column) numbers of its bold cells in `frame.attrs["bold"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype

from patchssl.runtime.errors import printable
from patchssl.runtime.files import write_text

NAMED = 3  # method, architecture, pretraining are words
LONGEST_CELL, LONGEST_NOTE = 200, 2_000  # characters that are shown of what a record says
TEX_HEAD = "% needs \\usepackage[T1]{fontenc}, \\usepackage{textcomp,array,booktabs,rotating}"
UPRIGHT, TURNED = 105, 165  # small letters that fit across an upright page, and across a turned one
WRAPPED, WRAPPED_TURNED = 20, 34  # letters of a cell beyond which it is broken into lines
_MARKDOWN = str.maketrans({"&": "&amp;", "<": "&lt;", **{mark: f"\\{mark}" for mark in "\\|*`~"}})
_TEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_\allowbreak{}",
        "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", "[": "{[}", "]": "{]}", "±": r"$\pm$", "†": r"\dag{}", "‡": r"\ddag{}", "–": "--",
        "…": r"\ldots{}", "'": r"\textquotesingle{}", '"': r"\textquotedbl{}", "`": r"\textasciigrave{}"}
_TEX_TABLE = str.maketrans(_TEX)
_FORMULA = ("=", "+", "-", "@")  # what a spreadsheet would compute
_LAST_LATIN = "\u017f"  # letters that pdflatex has


def write_frames(frames: Mapping[str, pd.DataFrame], numbers: Sequence[pd.DataFrame], out_dir: Path,
                 stem: str) -> list[Path]:
    """Write `frames` (title -> table) to STEM.md and STEM.tex, `numbers` one after the other to STEM.csv.

    Each file is whole at every moment; DataError where they cannot be written.
    """
    texts = {
        "md": "\n".join(f"## {_escape(title)}\n\n{to_markdown(frame)}" for title, frame in frames.items()),
        "csv": to_csv(numbers[0]) + "".join(to_csv(more).partition("\n")[2] for more in numbers[1:]),
        "tex": "\n".join([TEX_HEAD, *(to_latex(frame, title) for title, frame in frames.items())]),
    }
    paths = [out_dir / f"{stem}.{suffix}" for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text, "table")
    return paths


def to_markdown(frame: pd.DataFrame) -> str:
    """A padded pipe table, numbers to the right, and the frame's notes below it."""
    header, *body = _cells(frame, _escape, "**{}**")
    widths = [max(3, *(len(row[i]) for row in [header, *body])) for i in range(len(header))]
    named = min(NAMED, len(header))
    rule = ["-" * width if i < named else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [_line(header, widths, named), "| " + " | ".join(rule) + " |",
             *(_line(row, widths, named) for row in body)]
    notes = [f"- {note}" for note in _notes(frame, _escape)]
    return "\n".join(lines + (["", *notes] if notes else [])) + "\n"


def to_latex(frame: pd.DataFrame, caption: str) -> str:
    """A table for LaTeX as wide as the text, turned where it has many columns, the frame's notes below it."""
    header, *body = (" & ".join(row) + r" \\" for row in _cells(frame, tex, r"\textbf{{{}}}"))
    wanted, kind = _widths(frame, WRAPPED), "table"
    if sum(wanted) > UPRIGHT:
        wanted, kind = _widths(frame, WRAPPED_TURNED), "sidewaystable"
        if sum(wanted) > TURNED:
            wanted = wanted[:NAMED] + _widths(frame, 0)[NAMED:]
    aligned = [r"\raggedright" if i < NAMED else r"\raggedleft" for i in range(len(wanted))]
    columns = [rf">{{{side}\arraybackslash}}p{{\dimexpr{width / sum(wanted):.4f}\linewidth-2\tabcolsep}}"
               for side, width in zip(aligned, wanted, strict=True)]
    notes = [rf"{note}\par" for note in _notes(frame, tex)]
    return "\n".join([
        rf"\begin{{{kind}}}", rf"\caption{{{tex(caption)}}}", r"\scriptsize\setlength{\tabcolsep}{3pt}",
        r"\begin{tabular}{", *columns, "}", r"\toprule", header, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}", *([r"\par\smallskip\raggedright", *notes] if notes else []), rf"\end{{{kind}}}",
    ]) + "\n"


def _widths(frame: pd.DataFrame, most: int) -> list[int]:
    """Letters that each column should have room for: its longest word, and of its longest cell at `most` so many."""
    widths = []
    for i, name in enumerate(frame.columns):
        cells = [shortened(str(cell), LONGEST_CELL) for cell in frame.iloc[:, i]]
        words = [len(word) for text in [str(name), *cells] for word in text.split()]
        widths.append(2 + max(min(WRAPPED, max([1, *words])), min(most, max(map(len, cells), default=0))))
    return widths


def to_csv(frame: pd.DataFrame) -> str:
    """The frame as CSV with a header and line feeds; numbers have four decimals at most.

    Words that a spreadsheet would take for a formula begin with an apostrophe.
    """
    safe = frame.apply(lambda column: column if is_numeric_dtype(column) else column.map(_no_formula))
    return str(safe.to_csv(index=False, lineterminator="\n", na_rep=""))


def tex(text: str) -> str:
    r"""Text that LaTeX prints as it is; letters of other scripts than Latin by their numbers.

    >>> tex("50 % of a_b")
    '50 \\% of a\\_\\allowbreak{}b'
    """
    plain = " ".join(text.split())
    if not plain.isascii() or not plain.isprintable():
        plain = "".join(letter if letter in _TEX or (letter <= _LAST_LATIN and letter.isprintable())
                        else f"U+{ord(letter):04X}" for letter in plain)
    return plain.translate(_TEX_TABLE)


def _no_formula(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _cells(frame: pd.DataFrame, escape: Callable[[str], str], bold: str) -> list[list[str]]:
    """Header and rows, escaped, and the bold cells marked."""
    marked = set(frame.attrs.get("bold", ()))

    def shown(cell: object) -> str:
        return escape(shortened(str(cell), LONGEST_CELL))

    body = [[bold.format(shown(cell)) if (i, j) in marked else shown(cell) for j, cell in enumerate(row)]
            for i, row in enumerate(frame.itertuples(index=False))]
    return [[shown(name) for name in frame.columns], *body]


def _notes(frame: pd.DataFrame, escape: Callable[[str], str]) -> list[str]:
    return [escape(shortened(note, LONGEST_NOTE)) for note in frame.attrs.get("notes", [])]


def shortened(text: str, longest: int) -> str:
    """`text`, or its beginning and an ellipsis where it has more than `longest` letters."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _line(cells: Sequence[str], widths: Sequence[int], named: int) -> str:
    padded = [cell.ljust(width) if i < named else cell.rjust(width)
              for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]
    return "| " + " | ".join(padded) + " |"


def _escape(text: str) -> str:
    """Text that cannot break out of a Markdown cell, nor be a link, an image, code or bold there."""
    return printable(" ".join(text.split())).translate(_MARKDOWN).replace("](", "]\\(")
