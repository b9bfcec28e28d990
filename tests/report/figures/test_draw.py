"""What the plot commands and the quickstart draw: the right pixels, of the right views, before any figure."""

import shutil

import numpy as np
import pytest
import torch
from cases import each
from PIL import Image

from patchssl.models.load import load_backbone
from patchssl.pretrain.recipe import dump_recipe, load_recipe, parse_recipe
from patchssl.report.figures import draw as module
from patchssl.report.figures.draw import (
    draw_attention,
    draw_curves,
    draw_matches,
    draw_pca,
    draw_views,
    recipe_of,
)
from patchssl.report.figures.tokens import (
    attention_rows,
    component_colors,
    normalized,
    pad_to_patches,
    read_image,
    token_maps,
)
from patchssl.report.figures.views import color_title, recolored, views_of
from patchssl.runtime.errors import DataError, UsageError
from patchssl.workflows.probe import run_facts

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&embed_dim=24"
SIZES = ("model.patch_size=8", "views.global_size=32", "views.local_size=16", "views.num_local=4")
PLAIN = (*SIZES, "photometric.patch_share=0", "photometric.jitter=0", "photometric.grayscale=0",
         "photometric.blur=[0, 0, 0]", "photometric.solarize=[0, 0, 0]")


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(SMALL)


def test_read_image_from_a_file_a_set_and_a_folder(photo, colors):
    assert np.array_equal(read_image(str(photo)), np.asarray(Image.open(photo)))
    assert read_image("textures:7").shape == (32, 32, 3)
    assert np.array_equal(read_image(f"{colors}:0"), np.asarray(Image.open(colors / "train" / "blue" / "0.png")))


def test_a_file_whose_name_looks_like_an_index_is_a_file(photo, tmp_path):
    named = tmp_path / "photo:3"
    named.write_bytes(photo.read_bytes())
    assert read_image(str(named)).shape == (90, 120, 3)


@each(("name", "kind", "sentence"), [
    ("missing.jpg", DataError, "neither an image file nor SET:INDEX"),
    ("textures:-1", DataError, "neither an image file nor SET:INDEX"),
    ("textures:6000", DataError, "6000 images, the last is textures:5999"),
    ("texture:1", UsageError, "did you mean 'textures'"),
])
def test_read_image_says_what_is_wrong(name, kind, sentence):
    with pytest.raises(kind, match=sentence):
        read_image(name)


def test_the_recipe_of_a_run_is_the_one_it_was_made_with(tiny_run, tiny):
    data = run_facts(tiny_run)[1]
    assert recipe_of(str(tiny_run)) == load_recipe("quickstart", (*tiny, f"data={data}"))
    assert recipe_of(str(tiny_run), rule="paper").loss.rule == "paper"


@each(("model", "sizes"), [
    ("random:vit_tiny_patch16_224?depth=1", (16, 224, 96)),  # those of the paper
    (SMALL, (8, 32, 16)),
    ("random:vit_tiny_patch16_224?img_size=32&patch_size=32&depth=1", (32, 32, 32)),
])
def test_views_of_a_model_have_its_sizes(model, sizes):
    recipe = recipe_of("quickstart", model)
    assert (recipe.model.patch_size, recipe.views.global_size, recipe.views.local_size) == sizes
    assert parse_recipe(dump_recipe(recipe)) == recipe  # still a valid one


def test_views_are_crops_of_the_image_where_color_is_off(photo):
    pixels = read_image(str(photo))
    recipe = load_recipe("quickstart", PLAIN)
    geometry, _, colored = views_of(pixels, recipe, seed=1)
    assert [view.shape for view in colored] == [(32, 32, 3)] * 2 + [(16, 16, 3)] * 4
    for view, seen in zip(geometry, colored, strict=True):
        # red is 2 x row and green 2 x column, so the middle of a crop tells where it lies
        row, column = seen[..., 0].mean() / 2 + 0.5, seen[..., 1].mean() / 2 + 0.5
        assert row == pytest.approx(view.top + view.height / 2, abs=1)
        assert column == pytest.approx(view.left + view.width / 2, abs=1)
        rising = seen[..., 1].astype(float).mean(0)
        assert (rising[0] > rising[-1]) == view.mirrored


def test_views_depend_on_seed_and_index_alone(photo):
    pixels, recipe = read_image(str(photo)), load_recipe("quickstart", SIZES)
    first, again, other = (views_of(pixels, recipe, seed, 2).colored for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_views_that_a_batch_shares_are_the_same_share_of_every_image(photo, tmp_path, monkeypatch):
    recipe, pixels = load_recipe("quickstart", (*PLAIN, "views.shared_in_batch=true")), read_image(str(photo))
    geometry, _, colored = views_of(pixels, recipe, seed=1)
    assert views_of(read_image("textures:7"), recipe, seed=1)[0] == geometry
    for view, seen in zip(geometry, colored, strict=True):  # red is 2 x row of 90, green 2 x column of 120
        assert (seen[..., 0].mean() / 2 + 0.5) / 90 * 256 == pytest.approx(view.top + view.height / 2, abs=3)
        assert (seen[..., 1].mean() / 2 + 0.5) / 120 * 256 == pytest.approx(view.left + view.width / 2, abs=3)
    sheets = []
    monkeypatch.setattr("patchssl.report.plots.plot_views", lambda rows, out, title: sheets.extend(rows))
    draw_views([str(photo)] * 2, recipe, tmp_path / "views.png", seed=1)
    assert len(sheets) == 2
    for sheet in sheets:
        assert all(np.array_equal(a, b) for a, b in zip(sheet.images[1:], colored, strict=True))


def test_matches_of_shared_views_are_those_of_the_common_square(photo, tmp_path, monkeypatch):
    recipe, drawn = load_recipe("quickstart", (*PLAIN, "views.shared_in_batch=true")), []
    monkeypatch.setattr("patchssl.report.plots.plot_matches", lambda *args, overlap: drawn.append((args, overlap)))
    for image in (str(photo), "textures:7"):
        draw_matches(image, recipe, tmp_path / "matches.png")
    (first, overlap), (second, other) = drawn
    assert all(np.array_equal(a, b) for a, b in zip(first[2:4], second[2:4], strict=True))
    for seen in (overlap, other):  # outlines lie where the views were cut
        assert seen.image.shape == (256, 256, 3)
        assert seen.view_a.top + seen.view_a.height <= 256


def test_attention_rows_show_the_whole_image_padded_to_whole_patches(backbone, photo):
    pixels, said = read_image(str(photo)), []  # 90 x 120: short side to 32 gives 32 x 42
    [(seen, attention)] = attention_rows(backbone, [pixels], 32, say=said.append, names=["photo.jpg"])
    assert seen.shape == (32, 42, 3) and attention.shape == (3, 4, 6)
    assert said == ["photo.jpg: 32 x 42 pixels are padded at right and bottom to 32 x 48, whole patches of 8"]
    scaled = np.asarray(Image.fromarray(pixels).resize((42, 32), Image.Resampling.BICUBIC))
    assert np.abs(seen.astype(int) - scaled).max() <= 4
    assert (attention >= 0).all() and (attention.sum((1, 2)) < 1).all()  # the rest goes to the class token
    x = normalized(pixels, backbone, 32)
    padded = torch.cat([x, x[..., -1:].expand(-1, -1, -1, 6)], dim=-1)
    assert np.allclose(attention.reshape(3, -1), backbone.class_attention(padded)[0].numpy())


def test_whole_patches_are_not_padded_and_nothing_is_said(backbone):
    said = []
    [(seen, attention)] = attention_rows(backbone, [read_image("textures:0")], 32, say=said.append)
    assert (seen.shape, attention.shape, said) == ((32, 32, 3), (3, 4, 4), [])


def test_registers_are_dropped_from_the_attention():
    network = load_backbone("random:vit_small_patch14_reg4_dinov2?img_size=28&depth=1&embed_dim=24&num_heads=2")
    [(_, attention)] = attention_rows(network, [read_image("textures:0")], 28)
    assert network.module.num_reg_tokens == 4 and attention.shape == (2, 2, 2)


@each(("shape", "size", "kind", "sentence"), [
    ((32, 32), 7, UsageError, "--size 7 is less than the model's patch size of 8"),
    ((300, 1), 224, DataError, "235,200 patches"),
    ((1, 300), 224, DataError, "an image of 1 x 300 pixels"),
])
def test_attention_of_what_cannot_be_looked_at_is_refused(backbone, shape, size, kind, sentence):
    with pytest.raises(kind, match=sentence):
        attention_rows(backbone, [np.zeros((*shape, 3), np.uint8)], size)


@pytest.fixture
def seen_plots(monkeypatch):
    """Arguments that the functions of report.plots are called with, instead of a figure."""
    calls = {}
    for name in ("plot_attention", "plot_components", "plot_matches", "plot_views", "plot_curves"):
        monkeypatch.setattr(f"patchssl.report.plots.{name}",
                            lambda *given, _name=name, **named: calls.setdefault(_name, (given, named)))
    return calls


def test_attention_is_drawn_at_the_size_of_the_model_unless_asked(backbone, photo, tmp_path, seen_plots):
    draw_attention(backbone, [str(photo), "textures:0"], tmp_path / "a.png")
    (rows, out), _ = seen_plots["plot_attention"]
    assert [seen.shape for seen, _ in rows] == [(32, 42, 3), (32, 32, 3)]
    assert out == tmp_path / "a.png"


def test_token_maps_are_the_tokens_of_what_the_network_saw(backbone, photo):
    [(seen, tokens), (square, _)] = token_maps(backbone, [read_image(str(photo)), read_image("textures:0")], 32)
    assert (seen.shape, tokens.shape, square.shape) == ((32, 42, 3), (4, 6, 24), (32, 32, 3))
    own = backbone.tokens(pad_to_patches(normalized(read_image(str(photo)), backbone, 32), 8))[0, 1:]
    assert np.allclose(tokens.reshape(24, 24), own.detach().numpy(), atol=1e-6)
    resnet = load_backbone("random:resnet18")
    [(seen, tokens)] = token_maps(resnet, [read_image(str(photo))], 70)
    assert seen.shape[:2] == (70, 93) and tokens.shape == (3, 3, 512)


def test_colors_are_the_same_function_of_the_token_in_all_images():
    """By an eigendecomposition of the covariance of all tokens together, up to the sign of a component."""
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(rows, columns, 6)) * [9, 5, 3, 1, 1, 1] for rows, columns in ((4, 5), (3, 3))]
    maps[1][0, 0] = maps[0][2, 3]
    colors, shares = component_colors(maps)
    assert [part.shape for part in colors] == [(4, 5, 3), (3, 3, 3)]
    assert np.array_equal(colors[1][0, 0], colors[0][2, 3])
    tokens = np.concatenate([one.reshape(-1, 6) for one in maps])
    values, vectors = np.linalg.eigh(np.cov(tokens.T))
    places = tokens @ vectors[:, :-4:-1]
    low, high = np.percentile(places, [1, 99], axis=0)
    expected = ((places - low) / (high - low)).clip(0, 1)
    found = np.concatenate([part.reshape(-1, 3) for part in colors])
    for component in range(3):
        ours, theirs = found[:, component], expected[:, component]
        assert np.allclose(ours, theirs) or np.allclose(ours, 1 - theirs)
    assert shares == pytest.approx(values[:-4:-1] / values.sum())


def test_tokens_of_few_dimensions_leave_a_color_in_the_middle_and_constant_ones_have_none():
    colors, shares = component_colors([np.arange(12.0).reshape(3, 4, 1)])
    assert len(shares) == 1 and np.ptp(colors[0][..., 0]) == 1
    assert (colors[0][..., 1:] == 0.5).all()
    for value in (1.0, np.nan):
        with pytest.raises(UsageError, match="all the same, or not finite"):
            component_colors([np.full((3, 4, 2), value)])


def test_components_are_drawn_at_the_size_of_the_model_unless_asked(backbone, photo, tmp_path, seen_plots):
    draw_pca(backbone, [str(photo), "textures:0"], tmp_path / "p.png")
    (images, out), named = seen_plots["plot_components"]
    assert [seen.shape for seen, _ in images] == [(32, 42, 3), (32, 32, 3)]
    assert [colors.shape for _, colors in images] == [(4, 6, 3), (4, 4, 3)]
    assert out == tmp_path / "p.png" and 0 < sum(named["shares"]) <= 1


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_command_draws_components(patchssl, photo, tmp_path, suffix):
    out = tmp_path / f"p.{suffix}"
    ran = patchssl("plot", "pca", SMALL, photo, "textures:3", "--out", out)
    assert ran.code == 0 and ran.out.strip() == str(out) and out.stat().st_size > 1000


def test_matches_are_those_of_the_views_shown(photo, tmp_path, seen_plots):
    recipe = load_recipe("quickstart", SIZES)
    draw_matches(str(photo), recipe, tmp_path / "m.png", seed=4)
    (teacher, student, teacher_ids, student_ids, patch, _), named = seen_plots["plot_matches"]
    overlap = named["overlap"]
    assert (teacher.shape, student.shape, patch) == ((32, 32, 3), (16, 16, 3), 8)
    assert np.array_equal(overlap.image, read_image(str(photo))) and len(student_ids)
    for teacher_id, student_id in zip(teacher_ids, student_ids, strict=True):
        top, left, height, width = rectangle(overlap.view_a, teacher_id, 4)
        y, x, tall, wide = rectangle(overlap.view_b, student_id, 2)
        assert top <= y + tall / 2 < top + height and left <= x + wide / 2 < left + width


def rectangle(view, patch, per_side):
    """Where a patch of a view lies in the source image."""
    row, column = divmod(int(patch), per_side)
    column = per_side - 1 - column if view.mirrored else column
    height, width = view.height / per_side, view.width / per_side
    return view.top + row * height, view.left + column * width, height, width


def test_matches_without_local_views_are_between_globals(photo, tmp_path, seen_plots):
    draw_matches(str(photo), load_recipe("quickstart", (*SIZES, "views.num_local=0")), tmp_path / "m.png")
    (teacher, student, *_), _ = seen_plots["plot_matches"]
    assert teacher.shape == student.shape == (32, 32, 3)


def test_matches_that_never_come_are_said(photo, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "match_patches", lambda *_: (torch.empty(0), torch.empty(0)))
    with pytest.raises(DataError, match="another --seed"):
        draw_matches(str(photo), load_recipe("quickstart", SIZES), tmp_path / "m.png")


def test_a_sheet_shows_the_image_and_all_its_views_and_says_how_they_are_colored(photo, tmp_path, seen_plots):
    recipe = load_recipe("quickstart", (*SIZES, "views.num_local=1", "photometric.patchwise=none"))
    draw_views([str(photo), "textures:1"], recipe, tmp_path / "v.png")
    (sheets, _, title), _ = seen_plots["plot_views"]
    assert [sheet.captions for sheet in sheets] == [["image", "global 1", "global 2", "local 1"]] * 2
    assert [image.shape[0] for image in sheets[0].images] == [90, 32, 32, 16]
    assert title == color_title(recipe) and "none" in title


@pytest.mark.parametrize("mode", ["none", "replace"])
def test_a_sheet_is_colored_as_asked_and_not_as_the_recipe_says(photo, tmp_path, seen_plots, mode):
    recipe = load_recipe("quickstart", SIZES)  # replace, in some views
    draw_views([str(photo)], recipe, tmp_path / "v.png", patchwise=mode)
    (sheets, _, title), _ = seen_plots["plot_views"]
    expected = views_of(read_image(str(photo)), recolored(recipe, mode), seed=0).colored
    assert all(np.array_equal(a, b) for a, b in zip(sheets[0].images[1:], expected, strict=True))
    assert ["patch by patch" in caption for caption in sheets[0].captions[1:]] == [mode == "replace"] * 6
    assert title.startswith(f"color: {mode} (") and title.endswith("in every view")


def test_all_kinds_of_color_are_drawn_for_each_image(photo, tmp_path, seen_plots):
    draw_views([str(photo), "textures:1"], load_recipe("quickstart", SIZES), tmp_path / "v.png", patchwise="all")
    (sheets, _, title), _ = seen_plots["plot_views"]
    assert len(sheets) == 2 * 5 and "photometric.patchwise" in title
    for row, name in enumerate((str(photo), "textures:1")):
        assert np.array_equal(sheets[5 * row].images[0], read_image(name))


def test_curves_are_those_of_the_log(tiny_run, tmp_path, seen_plots):
    draw_curves(tiny_run, tmp_path / "c.png", {"random network": 0.5})
    (rows, _), named = seen_plots["plot_curves"]
    assert rows[-1]["step"] == 12
    assert named == {"references": {"random network": 0.5}, "num_prototypes": 32}


def test_damaged_rows_of_a_log_are_left_out_of_its_curves(tiny_run, tmp_path, seen_plots):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    whole = (run / "log.jsonl").read_text()
    draw_curves(run, tmp_path / "c.png")
    (rows, _), _ = seen_plots["plot_curves"]
    said = []
    (run / "log.jsonl").write_text("[1]\n" + whole + whole[:40])  # a kill cuts the last row short
    draw_curves(run, tmp_path / "c.png", say=said.append)
    (kept, _), _ = seen_plots["plot_curves"]
    assert kept == rows
    assert len(said) == 1 and "1 of" in said[0] and "damaged and left out" in said[0]
    (run / "log.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="no row that can be read"):
        draw_curves(run, tmp_path / "c.png")


def test_curves_of_several_runs_are_called_by_their_folders(tiny_run, tmp_path, seen_plots):
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    draw_curves(tiny_run, tmp_path / "c.png", others=[other])
    (rows, _), named = seen_plots["plot_curves"]
    assert named["name"] == tiny_run.name and named["others"] == {"other": rows} and named["num_prototypes"] == 32
    with pytest.raises(UsageError, match="named twice"):
        draw_curves(tiny_run, tmp_path / "c.png", others=[tiny_run])


def test_components_of_several_models_stand_below_each_other(photo, tmp_path, seen_plots):
    other = SMALL.replace("patch_size=8", "patch_size=4")
    draw_pca([SMALL, other], [str(photo)], tmp_path / "p.png")
    _, named = seen_plots["plot_components"]
    [(name, (images, shares, patch_size))] = named["others"].items()
    assert (named["name"], named["patch_size"], name, patch_size) == (SMALL, 8, other, 4)
    assert images[0][1].shape == (8, 11, 3) and 0 < sum(shares) <= 1


def test_a_figure_of_an_unknown_kind_is_refused_before_a_model_is_loaded(tmp_path):
    for draw in (draw_attention, draw_pca):
        with pytest.raises(UsageError, match=r"a\.bmp asks for a figure of type 'bmp'"):
            draw("nowhere.pth", ["missing.jpg"], tmp_path / "a.bmp")


def test_curves_need_a_log(tmp_path):
    with pytest.raises(UsageError, match=r"no log\.jsonl"):
        draw_curves(tmp_path, tmp_path / "c.png")
