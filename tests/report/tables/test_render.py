import pandas as pd
import pytest
from cases import each

from patchssl.report.tables.render import tex, to_csv, to_latex, to_markdown


def small(names=("M", "A", "P", "%")):
    frame = pd.DataFrame([["a_b", "x", "y", "50 ± 1"], ["[c", "–", "z", "7 †"]], columns=list(names))
    frame.attrs.update(bold=[(1, 3)], notes=["[1] source & more"])
    return frame


def test_a_table_as_latex():
    column = r">{{\{}\arraybackslash}}p{{\dimexpr{}\linewidth-2\tabcolsep}}"
    assert to_latex(small(), "k-NN #1").splitlines() == [
        r"\begin{table}", r"\caption{k-NN \#1}", r"\scriptsize\setlength{\tabcolsep}{3pt}", r"\begin{tabular}{",
        column.format("raggedright", "0.2632"), *[column.format("raggedright", "0.1579")] * 2,
        column.format("raggedleft", "0.4211"), "}", r"\toprule", r"M & A & P & \% \\",
        r"\midrule", r"a\_\allowbreak{}b & x & y & 50 $\pm$ 1 \\", r"{[}c & -- & z & \textbf{7 \dag{}} \\",
        r"\bottomrule", r"\end{tabular}", r"\par\smallskip\raggedright", r"{[}1{]} source \& more\par", r"\end{table}"]


def test_a_table_of_many_columns_is_turned_and_as_wide_as_the_text():
    frame = small([f"column {i}, 20-NN top-1, %" for i in range(4)])
    wide = pd.concat([frame] * 4, axis=1)
    wide.columns = [f"{name} {i}" for i, name in enumerate(wide.columns)]
    wide.iloc[0] = "longer than most cells"
    latex = to_latex(wide, "wide")
    assert latex.startswith(r"\begin{sidewaystable}") and latex.endswith("\\end{sidewaystable}\n")
    shares = [float(line.split(r"\dimexpr")[1].split(r"\linewidth")[0]) for line in latex.splitlines()
              if r"\dimexpr" in line]
    assert len(shares) == 16 and sum(shares) == pytest.approx(1, abs=2e-3)


@each(("name", "printed"), [
    (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
    ("$x^2~y$", r"\$x\textasciicircum{}2\textasciitilde{}y\$"),
    ("a\n\n% b", r"a \% b"),
    ("café \u4e2d\x1b", "café U+4E2DU+001B"),
    ("it's `x` \"y\"…", r"it\textquotesingle{}s \textasciigrave{}x\textasciigrave{} \textquotedbl{}y\textquotedbl{}"
                        r"\ldots{}"),
])
def test_hostile_names_are_printed_as_they_are(name, printed):
    assert tex(name) == printed


@each(("name", "printed"), [
    ("[x](http://example.org)", r"[x]\(http://example.org)"), ("**b** `c` ~d~", r"\*\*b\*\* \`c\` \~d\~"),
    ("a\\|b", r"a\\\|b"), ("\x1b[31m\u202ered", "?[31m?red"), ("x" * 300, "x" * 199 + "…"),
])
def test_a_name_is_no_markup_in_markdown(name, printed):
    frame = pd.DataFrame([[name]], columns=["Method"])
    assert to_markdown(frame).splitlines()[2] == f"| {printed} |"


def test_words_of_a_csv_are_no_formulas_and_numbers_stay_numbers():
    frame = pd.DataFrame({"model": ["=cmd()", "@x", "plain", None], "gain": [-1.5, 2.0, 3.0, None], "n": [1, 2, 3, 4]})
    assert to_csv(frame).splitlines()[1:] == ["'=cmd(),-1.5,1", "'@x,2.0,2", "plain,3.0,3", ",,4"]
