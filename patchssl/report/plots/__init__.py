"""Figures: every function takes plain arrays, writes one file and returns its path; nothing else names matplotlib.

No figure outlives its function.
"""

from patchssl.report.plots import library  # noqa: F401  # the first: without it the others may not be imported

# isort: split
from patchssl.report.plots.attention import plot_attention
from patchssl.report.plots.canvas import Pixels, check_figure_path
from patchssl.report.plots.curves import plot_curves
from patchssl.report.plots.matches import Overlap, plot_matches
from patchssl.report.plots.pca import plot_components
from patchssl.report.plots.robustness import plot_robustness
from patchssl.report.plots.tokens import MatchedPair, plot_token_matches
from patchssl.report.plots.views import Sheet, plot_views

__all__ = ["MatchedPair", "Overlap", "Pixels", "Sheet", "check_figure_path", "plot_attention", "plot_components",
           "plot_curves", "plot_matches", "plot_robustness", "plot_token_matches", "plot_views"]
