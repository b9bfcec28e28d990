import itertools
import math
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from cases import each
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from PIL import Image

from patchssl.report.plots import (
    Overlap,
    Sheet,
    canvas,
    plot_attention,
    plot_components,
    plot_curves,
    plot_matches,
    plot_views,
)
from patchssl.report.plots.attention import largest_mass
from patchssl.report.plots.tokens import MatchedPair, plot_token_matches
from patchssl.runtime.errors import DataError, UsageError
from patchssl.views.geometry import View
from patchssl.views.matching import match_patches


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def log(rows: int = 12) -> list[dict]:
    """A log as training writes it, k-NN in every fourth row."""
    found = []
    for i in range(rows):
        row = {
            "step": 10 * i,
            "epoch": i / 2,
            "seconds": 3.0 * i,
            "loss": 8 - 0.1 * i,
            "class_loss": 5 - 0.1 * i,
            "patch_loss": 3.0,
            "teacher_entropy": 4 - 0.2 * i,
            "patch_entropy": 4.5,
            "marginal_entropy": 5.5,
            "effective_rank": 5.0 + i,
            "feature_spread": 0.9,
        }
        found.append({**row, "knn_top1": 0.1 + 0.01 * i} if i % 4 == 3 else row)
    return found


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes]


def lines(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


def numbers(axes) -> dict[tuple[int, int], str]:
    """(row, column) of the patch -> the number that is written on it."""
    return {
        (int(text.get_position()[1]), int(text.get_position()[0])): text.get_text() for text in axes.texts
    }


def frames(axes) -> dict[tuple[int, int], tuple]:
    """(row, column) of the patch -> the color of its frame."""
    found = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return {(int(frame.get_y()), int(frame.get_x())): frame.get_edgecolor()[:3] for frame in found}


def test_curves_show_the_log_in_percent_and_with_reference_lines(drawn, tmp_path):
    rows = log()
    plot_curves(rows, tmp_path / "a.png", references={"raw pixels": 0.159}, num_prototypes=1024)
    (figure,) = drawn
    assert len(figure.axes) == 4
    loss, knn, entropy, rank = figure.axes
    assert lines(loss)["class tokens"][:, 1].tolist() == [row["class_loss"] for row in rows]
    assert lines(knn)["this run"] == pytest.approx(np.array([[1.5, 13.0], [3.5, 17.0], [5.5, 21.0]]))
    assert lines(knn)["raw pixels"][:, 1].tolist() == pytest.approx([15.9, 15.9])
    assert any(np.allclose(line.get_ydata(), math.log(1024)) for line in entropy.get_lines())
    assert "6.93" in entropy.texts[0].get_text()
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "cross-entropy (nats)",
        "top-1 accuracy (%)",
        "entropy (nats)",
        "effective rank",
    ]
    assert rank.get_lines()[0].get_xydata().tolist() == [
        [row["epoch"], row["effective_rank"]] for row in rows
    ]


def test_curves_over_epochs_beside_another_run(drawn, tmp_path):
    plot_curves(log(), tmp_path / "a.png", others={"DINO": log()})
    knn = drawn[0].axes[1]
    assert lines(knn)["DINO"][:, 0].tolist() == [1.5, 3.5, 5.5]
    assert drawn[0].axes[-1].get_xlabel() == "epoch"


def test_several_runs_have_one_line_each_in_every_panel_and_one_color(drawn, tmp_path):
    plot_curves(log(), tmp_path / "a.png", others={"DINO": log(8), "_iBOT": log(4)}, name="PW-Self",
                references={"pixels": 0.1})
    for axes in drawn[0].axes:
        runs = [line for line in axes.get_lines() if line.get_label() != "pixels"]
        assert [line.get_color() for line in runs] == list(canvas.LINES[:3])
        assert [len(line.get_xdata()) for line in runs] in ([12, 8, 4], [3, 2, 1])
    assert [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()] == [
        "PW-Self", "DINO", " _iBOT", "pixels"]
    assert "class tokens" in titles(drawn[0])[2]
    plot_curves([{"epoch": 1.0, "loss": 2.0}], tmp_path / "a.png", others={"DINO": log()})
    assert [text.get_text() for text in drawn[1].axes[0].get_legend().get_texts()] == ["this run", "DINO"]
    with pytest.raises(UsageError, match="8 runs"):
        plot_curves(log(), tmp_path / "a.png", others={str(i): log() for i in range(7)})


def test_panels_without_numbers_are_left_out(drawn, tmp_path):
    plot_curves(
        [{"epoch": 0.5, "loss": 3.0}, {"epoch": 1.0, "loss": 2.0, "knn_top1": None}], tmp_path / "a.png"
    )
    assert titles(drawn[0]) == ["Loss"]


def test_the_loss_of_a_run_without_patch_term_is_one_line(drawn, tmp_path):
    plot_curves([{**row, "patch_loss": 0.0} for row in log()], tmp_path / "a.png")
    assert len(drawn[0].axes[0].get_lines()) == 1


def test_long_logs_are_smoothed_without_moving_a_straight_line(drawn, tmp_path):
    plot_curves([{"epoch": float(i), "loss": 2.0} for i in range(500)], tmp_path / "a.png")
    raw, smooth = drawn[0].axes[0].get_lines()
    assert len(raw.get_xydata()) == 500
    assert smooth.get_ydata() == pytest.approx(2.0)
    assert smooth.get_xdata()[-1] == 499.0


def test_a_log_without_numbers_is_refused(tmp_path):
    with pytest.raises(UsageError, match="nothing to draw"):
        plot_curves([{"epoch": 1.0}], tmp_path / "a.png")


def test_attention_is_drawn_in_units_of_uniform_attention(drawn, tmp_path):
    attention = np.full((3, 2, 4), 1 / 8)
    attention[1] = 0
    attention[1, 0, 3] = 0.5
    plot_attention([(noise(16, 32), attention)], tmp_path / "a.png", titles=["noise"])
    axes = [axes for axes in drawn[0].axes if axes.get_title()]
    assert [a.get_title() for a in axes] == ["image", "mean of heads", "head 1", "head 2", "head 3"]
    maps = [np.asarray(a.get_images()[0].get_array()) for a in axes[1:]]
    overlaid, *masses = drawn[0].axes[5:10]
    assert overlaid.get_xlabel() == "mean, overlaid"
    # of uniform attention 60 % are 5 of 8 patches, of head 2 one; of the mean, 1/4 and 7 x 1/12, 1/4 + 3/12 of 5/6
    assert [a.get_xlabel() for a in masses] == ["60% of mass in\n50% of patches", "62%", "12%", "62%"]
    veil = np.asarray(masses[2].get_images()[1].get_array())
    assert veil[0, 3, 3] == 0 and (np.delete(veil.reshape(8, 4), 3, axis=0)[:, 3] > 0.5).all()
    assert np.allclose(maps[1], 1)
    assert maps[2][0, 3] == pytest.approx(4)
    assert maps[0][0, 3] == pytest.approx((1 + 4 + 1) / 3)
    assert axes[0].get_ylabel() == "noise"
    assert len({tuple(a.get_images()[0].get_clim()) for a in axes[1:]}) == 1


def test_the_largest_mass_is_the_fewest_patches_that_hold_it():
    """By trying all sets of patches, in the order of their number."""
    rng = np.random.default_rng(0)
    for share in (0.2, 0.6, 0.95, 1.0):
        values = rng.random((2, 4)) ** 3
        mask = largest_mass(values, share)
        count = next(n for n in range(1, 9) if max(
            sum(chosen) for chosen in itertools.combinations(values.ravel(), n)) >= share * values.sum() - 1e-12)
        assert mask.sum() == count and values[mask].min() >= values[~mask].max(initial=0)
    assert largest_mass(np.full((1, 10), 0.1), 0.6).tolist() == [[True] * 6 + [False] * 4]
    with pytest.raises(ValueError, match="share of the mass"):
        largest_mass(np.ones((2, 2)), 0)


def test_padding_is_cut_off_and_said_below_the_image(drawn, tmp_path):
    plot_attention([(noise(16, 21), np.full((1, 2, 3), 1 / 6))], tmp_path / "a.png", patch_size=8)
    image, mean = drawn[0].axes[:2]
    assert image.get_xlabel() == "16 × 21 px,\npadded to 16 × 24"
    assert tuple(mean.get_images()[0].get_extent()) == (0, 24, 16, 0)
    assert (mean.get_xlim(), mean.get_ylim()) == ((0, 21), (16, 0))


def test_uniform_attention_is_not_stretched_into_structure(drawn, tmp_path):
    attention = (1 + 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 4))) / 16
    plot_attention([(noise(8, 8), attention)], tmp_path / "a.png")
    low, high = drawn[0].axes[1].get_images()[0].get_clim()
    assert (low, high) == pytest.approx((0.5, 1.5), abs=0.02)


def test_colors_over_the_image_are_those_of_the_scale(drawn, tmp_path):
    plot_attention([(noise(8, 8), np.random.default_rng(0).dirichlet(np.ones(16), 2).reshape(2, 4, 4))],
                   tmp_path / "a.png")
    maps, overlay = drawn[0].axes[1].images[0], drawn[0].axes[4]
    below, above = overlay.images
    assert not np.ptp(below.get_array(), axis=-1).any()  # gray: no hue of its own
    assert above.get_clim() == maps.get_clim() and np.array_equal(above.get_array(), maps.get_array())


def test_rows_of_attention_have_one_number_of_heads(tmp_path):
    rows = [(noise(8, 8), np.ones((heads, 2, 2)) / 4) for heads in (2, 3)]
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        plot_attention(rows, tmp_path / "a.png")


def test_partners_have_the_same_number_and_color(drawn, tmp_path):
    teacher, student = View(0, 0, 64, 64, False, 64), View(0, 32, 32, 64, True, 32)
    ids_a, ids_b = (ids.numpy() for ids in match_patches(teacher, student, 16))
    plot_matches(noise(64, 64), noise(32, 32), ids_a, ids_b, 16, tmp_path / "a.png")
    left, right = drawn[0].axes
    for a, b in zip(ids_a, ids_b, strict=True):
        first, second = divmod(int(a), 4), divmod(int(b), 2)
        assert numbers(left)[first] == numbers(right)[second]
        assert frames(left)[first] == frames(right)[second]
    assert len(frames(left)) == len(set(ids_a))
    assert len(frames(right)) == len(ids_b)
    assert "student view, 32 px, 2 x 2 patches" in titles(drawn[0])


def test_the_title_counts_matches_and_the_teacher_s_patches(drawn, tmp_path):
    plot_matches(noise(64, 64), noise(32, 32), [5, 5, 6], [0, 1, 3], 16, tmp_path / "a.png")
    assert drawn[0].get_suptitle() == (
        "3 of 4 patches of the student view matched, with 2 of 16 of the teacher view"
    )
    left, right = drawn[0].axes
    assert numbers(right) == {(0, 0): "1", (0, 1): "1", (1, 1): "2"}
    assert numbers(left) == {(1, 1): "1", (1, 2): "2"}


def test_patches_without_a_match_are_dimmed(drawn, tmp_path):
    plot_matches(noise(32, 32), noise(32, 32), [0], [3], 16, tmp_path / "a.png")
    tint = np.asarray(drawn[0].axes[1].get_images()[1].get_array()).reshape(4, 4)
    assert tint[:3, :3].tolist() == [[1, 1, 1]] * 3
    assert tint[3, :3] == pytest.approx(frames(drawn[0].axes[1])[(1, 1)])


def test_more_than_sixty_matches_are_colored_only(drawn, tmp_path):
    ids = np.arange(64)
    plot_matches(noise(64, 64), noise(64, 64), ids, ids, 8, tmp_path / "a.png")
    left, right = drawn[0].axes
    assert numbers(left) == {}
    assert len(set(frames(right).values())) == 64


def test_two_views_without_a_match_can_be_drawn(drawn, tmp_path):
    plot_matches(noise(32, 32), noise(16, 16), [], [], 8, tmp_path / "a.png")
    assert drawn[0].get_suptitle().startswith("0 of 4 patches")


def test_the_source_panel_shows_where_both_crops_lie(drawn, tmp_path):
    a, b = View(3, 5, 20, 30, False, 32), View(10, 12, 8, 9, True, 16)
    plot_matches(
        noise(32, 32), noise(16, 16), [0], [0], 8, tmp_path / "a.png", overlap=Overlap(noise(40, 60), a, b)
    )
    source = drawn[0].axes[0]
    for frame, view in zip(source.patches, (a, b), strict=True):
        assert (frame.get_y() + 0.5, frame.get_x() + 0.5) == (view.top, view.left)
        assert (frame.get_height(), frame.get_width()) == (view.height, view.width)
    assert [text.get_text() for text in source.get_legend().get_texts()] == [
        "teacher view",
        "student view (mirrored)",
    ]


def test_ids_of_different_lengths_are_refused(tmp_path):
    with pytest.raises(ValueError, match="pairs"):
        plot_matches(noise(32, 32), noise(32, 32), [0, 1], [0], 16, tmp_path / "a.png")


def test_a_sheet_shows_every_view_with_its_caption(drawn, tmp_path):
    images = [noise(16, 24), noise(8, 8, 1), noise(4, 4, 2)]
    sheets = [Sheet(images, ["image", "global", "local"]), Sheet(images[:2], ["image", "global"])]
    plot_views(sheets, tmp_path / "a.png")
    assert titles(drawn[0]) == ["image", "global", "local", "image", "global", ""]
    shown = [np.asarray(axes.get_images()[0].get_array()) for axes in drawn[0].axes if axes.get_images()]
    assert all(np.array_equal(a, b) for a, b in zip(shown, [*images, *images[:2]], strict=True))


def test_words_stand_in_a_cell_and_a_title_above_the_sheet(drawn, tmp_path):
    sheets = [Sheet([noise(8, 8), noise(8, 8)], ["image", "global"]),
              Sheet(["layered\nthe whole view, then each patch", noise(8, 8)], ["", ""])]
    plot_views(sheets, tmp_path / "a.png", "color: layered")
    assert drawn[0].get_suptitle() == "color: layered"
    [words] = drawn[0].axes[2].texts
    assert words.get_text() == "layered\nthe whole view, then\neach patch" and not drawn[0].axes[2].images
    plot_views(sheets, tmp_path / "b.png")
    assert drawn[1].get_suptitle() == ""
    # what is written fits its cell
    box = words.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn[0].axes[3].get_window_extent().x0


@each(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_chooses_the_format_and_the_same_figure_has_the_same_bytes(tmp_path, suffix, start):
    sheet = Sheet([noise(4, 4), noise(4, 4, 1)], ["image", "global"])
    first, second = (plot_views([sheet], tmp_path / str(i) / f"a{suffix}").read_bytes() for i in range(2))
    assert first.startswith(start)
    assert first == second


def test_places_do_not_depend_on_the_last_bits_of_the_layout(drawn, tmp_path, monkeypatch):
    """The solver's rounding differs between runs; here by far more than it does."""
    execute, nudges = ConstrainedLayoutEngine.execute, itertools.count()

    def nudged(engine, figure):
        execute(engine, figure)
        for axes in figure.axes:
            box = axes.get_position(original=True)
            axes.set_position([*box.p0 + 1e-13 * next(nudges), box.width, box.height])
        for part in figure.subfigs:
            part.bbox_relative.p1 = part.bbox_relative.p1 + 1e-13 * next(nudges)

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", nudged)
    image, tokens = noise(16, 16), (np.arange(4), np.arange(4))
    pair = MatchedPair("found", (image, image), ((2, 2), (2, 2)), 8, tokens, np.linspace(0.9, 0.1, 4))
    overlap = Overlap(image, View(0, 0, 16, 16, False, 16), View(4, 4, 8, 8, False, 16))
    for i in range(2):
        plot_token_matches([pair], tmp_path / f"{i}.png", names=("wide", "close"), color="place", source=overlap)
    assert next(nudges) > 0
    places = [[*(axes.get_position(original=True).bounds for axes in figure.axes),
               *(part.bbox_relative.bounds for part in figure.subfigs)] for figure in drawn]
    assert places[0] == places[1] and len(places[0]) == 5


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(UsageError, match=r"'bmp'.*pdf.*png.*svg"):
        plot_views([Sheet([noise(4, 4)], ["a"])], tmp_path / "a.bmp")


def test_curves_are_large_enough_to_print_and_leave_matplotlib_s_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    path = plot_curves(log(), tmp_path / "a.png", num_prototypes=1024, references={"pixels": 0.15})
    assert dict(matplotlib.rcParams) == before
    with Image.open(path) as image:
        assert image.width >= 1200
        assert len(np.unique(np.asarray(image.convert("L")))) > 10


def test_matches_and_attention_are_written(tmp_path):
    ids = np.arange(4)
    view = View(0, 0, 8, 8, False, 8)
    paths = [
        plot_matches(
            noise(8, 8),
            noise(8, 8),
            ids,
            ids,
            4,
            tmp_path / "m.png",
            overlap=Overlap(noise(8, 8), view, view),
        ),
        plot_attention([(noise(8, 8), np.ones((2, 2, 2)) / 4)], tmp_path / "a.png"),
    ]
    for path in paths:
        with Image.open(path) as image:
            assert image.width > image.height > 100


def test_line_colors_differ_in_lightness_or_hue_for_color_blind_readers():
    def seen_by_deuteranopes(color: str) -> np.ndarray:
        # Machado, Oliveira and Fernandes (2009), severity 1.0, on linear RGB
        matrix = np.array(
            [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
        )
        linear = np.array(to_rgb(color)) ** 2.2
        return np.clip(matrix @ linear, 0, 1) ** (1 / 2.2)

    used_together = [
        (canvas.BLUE, canvas.ORANGE, canvas.GREEN),
        (canvas.BLUE, canvas.GREEN, canvas.PURPLE, canvas.GRAY),
    ]
    for group in used_together:
        seen = [seen_by_deuteranopes(color) for color in group]
        gaps = [np.linalg.norm(a - b) for i, a in enumerate(seen) for b in seen[:i]]
        assert min(gaps) > 0.1


def test_components_stand_below_their_image_at_its_size(drawn, tmp_path):
    images = [(noise(32, 48, i), np.random.default_rng(i).random((4, 6, 3))) for i in range(8)]
    plot_components(images, tmp_path / "p.png", shares=[0.42, 0.2, 0.11])
    axes = np.array(drawn[0].axes).reshape(4, 6)  # two bands of six
    for number, (image, colors) in enumerate(images):
        band, column = divmod(number, 6)
        above, below = axes[2 * band, column].images[0], axes[2 * band + 1, column].images[0]
        assert np.array_equal(above.get_array(), image) and np.allclose(below.get_array(), colors)
        assert tuple(below.get_extent()) == tuple(above.get_extent())
    assert [len(spare.images) for spare in axes[2:, 2:].flat] == [0] * 8
    assert "red 42%, green 20%, blue 11%" in drawn[0].get_suptitle()


def test_components_of_another_network_stand_below_with_its_name_and_padding(drawn, tmp_path):
    first, second = [(noise(16, 16), np.zeros((2, 2, 3)))], [(noise(20, 20), np.ones((2, 2, 3)))]
    plot_components(first, tmp_path / "p.png", shares=[0.5], name="run", patch_size=8,
                    others={"net": (second, [0.25], 16)})
    image, above, below = drawn[0].axes
    assert len(image.images) == 1
    assert (above.get_ylabel(), below.get_ylabel()) == ("run", "net")
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "20 × 20 px, padded to 32 × 32")
    assert drawn[0].get_suptitle().splitlines()[1:] == ["run: red 50%", "net: red 25%"]


def test_a_failed_figure_leaves_the_earlier_one(tmp_path, monkeypatch):
    sheet, out = Sheet([noise(4, 4)], ["a"]), tmp_path / "a.png"
    before = plot_views([sheet], out).read_bytes()

    def fail(figure, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(DataError, match="No space left"):
        plot_views([sheet], out)
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]
