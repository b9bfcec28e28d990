"""`plot matches` with models: which figure is asked for, and what it says."""

import numpy as np
import pytest
import torch

from patchssl.models.load import load_backbone
from patchssl.report.figures import matches as module
from patchssl.report.figures.nearest import RIGHT, match_views
from patchssl.report.figures.tokens import item_name, read_image, token_maps

SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&depth=1&embed_dim=24"
PIXELS = "pixels?img_size=32&patch_size=4"
CPU = torch.device("cpu")


@pytest.fixture
def drawn(monkeypatch):
    """Arguments of the figure, instead of a figure."""
    calls = []
    monkeypatch.setattr(module, "plot_token_matches", lambda pairs, out, **named: calls.append((pairs, named)))
    return calls


def test_models_are_compared_on_the_same_crops_at_their_own_sizes(photo, tmp_path, drawn):
    module.draw_view_matches([SMALL, PIXELS], str(photo), tmp_path / "m.png", seed=2, lines=3, device=CPU,
                                  say=print)
    [(pairs, named)] = drawn
    found = match_views(load_backbone(SMALL), read_image(str(photo)), "photo.png", seed=2)
    assert pairs[0].title.splitlines() == [
        SMALL, f"{found.exact:.0%} of {found.num_patches} patches find the right one, {found.within1:.0%} it or a "
        "neighbor;", f"of the 3 best of {len(found.matches.first)} mutual matches "
        f"{(found.verdicts[:3] == RIGHT).sum()} are right"]
    assert np.array_equal(pairs[0].ids[0], found.matches.first)
    assert [pair.grids for pair in pairs] == [((4, 4), (4, 4)), ((8, 8), (8, 8))]
    assert np.array_equal(named["source"].image, read_image(str(photo)))
    assert (named["source"].view_a, named["source"].view_b) == found.views


def test_two_images_are_matched_as_wholes_and_padding_is_said(photo, tmp_path, drawn):
    said = []
    module.draw_image_matches([SMALL], (str(photo), "textures:0"), tmp_path / "m.png", device=CPU,
                                   say=said.append)
    [([pair], named)] = drawn
    (first, tokens), (second, others) = token_maps(load_backbone(SMALL), [read_image(str(photo)),
                                                                          read_image("textures:0")], 32)
    assert np.array_equal(pair.images[0], first) and np.array_equal(pair.images[1], second)
    assert pair.grids == (tokens.shape[:2], others.shape[:2]) == ((4, 6), (4, 4))
    unit = [part.reshape(-1, 24) / np.linalg.norm(part.reshape(-1, 24), axis=1)[:, None] for part in (tokens, others)]
    cosines = (unit[0] @ unit[1].T)[pair.ids]
    assert pair.similarity == pytest.approx(cosines, abs=1e-5) and pair.verdicts is None
    assert f"of {len(cosines)} mutual matches, of 24 and 16 patches" in pair.title
    assert len([sentence for sentence in said if "padded" in sentence]) == 1
    assert named["names"] == ("first image", "second image")


def test_a_file_is_called_by_its_name_and_an_image_of_a_set_by_the_sets(photo, colors):
    assert item_name(str(photo)) == "photo.png"
    assert item_name(f"{colors}:0").endswith("blue/0.png")


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "code", "sentence"), [
    (["textures:0", "--model", SMALL], 0, ""),
    (["textures:0", "textures:1", "--model", SMALL, "--model", PIXELS, "--color", "place"], 0, ""),
    (["textures:0", "--model", SMALL, "--rule", "center"], 0, ""),
    (["textures:0", "textures:1"], 2, "need --model"),
    (["textures:0", "--rule", "similarity"], 2, "need --model"),
    (["textures:0", "--model", SMALL, "--model", PIXELS, "--rule", "center"], 2, "at most one --model"),
    (["textures:0", "--model", SMALL, "--size", "64"], 2, "--size is for two images"),
    (["textures:0", "--model", SMALL, "--color", "rigth"], 2, "did you mean 'right'"),
    (["textures:0", "textures:1", "--model", SMALL, "--color", "right"], 2, "two views of one image only"),
    (["textures:0", "missing.jpg", "--model", SMALL], 4, "missing.jpg is neither"),
])
def test_the_command_draws_or_says_why_not(patchssl, tmp_path, arguments, code, sentence):
    out = tmp_path / "m.svg"
    ran = patchssl("plot", "matches", *arguments, "--out", out)
    assert ran.code == code and sentence in ran.err, ran.err
    assert out.is_file() == (code == 0)
