"""The figure of token matches: which lines are drawn, from where to where, and what their looks mean."""


import numpy as np
import pytest
from matplotlib.legend import Legend
from matplotlib.patches import ConnectionPatch

from patchssl.report.plots import MatchedPair, Overlap, plot_token_matches
from patchssl.report.plots.tokens import VERDICTS
from patchssl.runtime.errors import UsageError
from patchssl.views.geometry import View

IDS = np.array([0, 4, 5]), np.array([3, 0, 1])


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pair(verdicts=None, title="net"):
    """Images of 16 x 21 and 16 x 16 pixels in patches of 8: 2 x 3, padded to 24, and 2 x 2."""
    return MatchedPair(title, (noise(16, 21), noise(16, 16)), ((2, 3), (2, 2)), 8, IDS, np.array([0.9, 0.5, 0.1]),
                       verdicts)


def lines(figure):
    return list(figure.findobj(ConnectionPatch))[::-1]  # best last, so that it lies on top


def test_lines_join_the_centers_of_matched_patches_best_first(drawn, tmp_path):
    plot_token_matches([pair()], tmp_path / "m.png", names=("first image", "second image"), lines=2)
    first, second = lines(drawn[0])
    assert (first.xy1, first.xy2) == ((4, 4), (12, 12))
    assert (second.xy1, second.xy2) == ((12, 12), (4, 4))
    axes = drawn[0].axes
    assert axes[0].get_xlabel() == "first image, 2 × 3 patches of 8 px\n16 × 21 px, padded to 16 × 24"
    assert axes[1].get_xlabel() == "second image, 2 × 2 patches of 8 px"
    assert axes[2].get_ylabel() == "cosine similarity"


def test_images_of_unequal_height_begin_level_below_a_long_title(drawn, tmp_path):
    plot_token_matches([pair(title="a title that is longer than the first image is wide " * 2)], tmp_path / "m.png",
                       names=("a", "b"))
    drawn[0].draw_without_rendering()
    first, second = (axes.get_window_extent() for axes in drawn[0].axes[:2])
    assert first.height != pytest.approx(second.height) and first.y1 == pytest.approx(second.y1)


@pytest.mark.parametrize("cosine", [0.4, 1.0])
def test_the_scale_of_one_similarity_ends_at_it(drawn, tmp_path, cosine):
    one = pair()._replace(ids=(np.array([0]), np.array([3])), similarity=np.array([cosine]))
    plot_token_matches([one], tmp_path / "m.png", names=("a", "b"))
    low, high = drawn[0].axes[2].get_ylim()
    assert (low, high) == pytest.approx((cosine - 0.02, cosine))


def test_a_padded_patch_is_marked_in_the_middle_of_what_is_there(drawn, tmp_path):
    plot_token_matches([pair()], tmp_path / "m.png", names=("a", "b"))
    assert lines(drawn[0])[2].xy1 == (18.5, 12)  # patch 5: pixels 16 to 21


def test_looks_say_which_matches_are_right_beside_the_source(drawn, tmp_path):
    views = View(0, 0, 16, 16, False, 16), View(0, 0, 8, 8, True, 16)
    rows = [pair(np.array([2, 1, 0]), title) for title in ("one", "two")]
    source = Overlap(noise(20, 20), *views)
    plot_token_matches(rows, tmp_path / "m.png", names=("wide view", "close view"), source=source)
    found = [(line.get_edgecolor()[:3], line.get_linestyle()) for line in lines(drawn[0])]
    assert len({color for color, _ in found}) == len({style for _, style in found}) == 3
    assert len(found) == 6
    texts = [text.get_text() for legend in drawn[0].findobj(Legend) for text in legend.get_texts()]
    assert texts == ["wide view", "close view (mirrored)", *(name for name, *_ in reversed(VERDICTS))]
    assert [axes.get_title(loc="left") for axes in drawn[0].axes if axes.get_title(loc="left")] == ["one", "two"]


def test_colors_by_place_are_those_of_the_patch_in_the_first_image(drawn, tmp_path):
    plot_token_matches([pair(np.array([2, 1, 0]))], tmp_path / "m.png", names=("a", "b"), color="place")
    assert len({line.get_edgecolor()[:3] for line in lines(drawn[0])}) == 3
    assert drawn[0].get_supxlabel() == "color: place in the a"


@pytest.mark.parametrize(("color", "sentence"), [("right", "two views of one image only"), ("similar", "similarity")])
def test_colors_that_mean_nothing_are_refused(tmp_path, color, sentence):
    with pytest.raises(UsageError, match=sentence):
        plot_token_matches([pair()], tmp_path / "m.png", names=("a", "b"), color=color)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_matches_have_the_same_bytes_and_none_can_be_drawn(tmp_path, suffix):
    empty = pair()._replace(ids=(np.array([], int), np.array([], int)), similarity=np.array([]))
    for which in (pair(), empty):
        first, second = (plot_token_matches([which], tmp_path / f"{i}.{suffix}", names=("a", "b")).read_bytes()
                         for i in range(2))
        assert first == second
