import pandas as pd
import pytest

from patchssl.report.render import tex, to_latex


def test_a_table_as_latex():
    frame = pd.DataFrame([["a_b", "x", "y", "50 ± 1"], ["[c", "–", "z", "7 †"]], columns=["M", "A", "P", "%"])
    frame.attrs.update(bold=[(1, 3)], notes=["[1] source & more"])
    assert to_latex(frame, "k-NN #1").splitlines() == [
        r"\begin{table}", r"\caption{k-NN \#1}", r"\begin{tabular}{lllr}", r"\toprule", r"M & A & P & \% \\",
        r"\midrule", r"a\_b & x & y & 50 $\pm$ 1 \\", r"{[}c & -- & z & \textbf{7 \dag{}} \\", r"\bottomrule",
        r"\end{tabular}", r"\begin{itemize}", r"\item {[}1{]} source \& more", r"\end{itemize}", r"\end{table}"]


@pytest.mark.parametrize(("name", "printed"), [
    (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
    ("$x^2~y$", r"\$x\textasciicircum{}2\textasciitilde{}y\$"),
    ("a\n\n% b", r"a \% b"),
])
def test_hostile_names_are_printed_as_they_are(name, printed):
    assert tex(name) == printed
