"""Figures: every function takes plain arrays, writes one file and returns its path; nothing else names matplotlib.

No figure outlives its function.
"""

from patchssl.report.plots.attention import plot_attention
from patchssl.report.plots.canvas import Pixels
from patchssl.report.plots.components import plot_components
from patchssl.report.plots.curves import plot_curves
from patchssl.report.plots.matches import Overlap, plot_matches
from patchssl.report.plots.robustness import plot_robustness
from patchssl.report.plots.views import Sheet, plot_views

__all__ = ["Overlap", "Pixels", "Sheet", "plot_attention", "plot_components", "plot_curves", "plot_matches",
           "plot_robustness", "plot_views"]
