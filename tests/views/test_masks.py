"""Masks against those that iBOT's loader draws, and against what the recipe allows."""

import math

import numpy as np
import pytest
from cases import each
from record_masking import MASKING, SIDE, VIEWS
from scipy import ndimage, stats

from patchssl.views.config import MaskConfig
from patchssl.views.masks import draw_masks


def drawn(num_views=VIEWS, side=SIDE, seed=0, **config):
    masks = draw_masks(np.random.default_rng(seed), num_views, side, side, MaskConfig(**config))
    return masks.reshape(num_views, side, side)


@pytest.fixture(scope="module")
def official():
    bits = np.unpackbits(np.load(MASKING)["masks"], axis=1, count=SIDE**2)
    return bits.reshape(VIEWS, SIDE, SIDE).astype(bool)


def outline(masks):
    """Borders between hidden and shown patches per hidden patch, of masked views: small where blocks are big."""
    edges = (masks[:, 1:] != masks[:, :-1]).sum((1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum((1, 2))
    return edges[masks.any((1, 2))] / masks.sum((1, 2))[masks.any((1, 2))]


def islands(masks):
    """Sizes of connected hidden areas, in patches."""
    return np.concatenate([np.bincount(ndimage.label(mask)[0].ravel())[1:] for mask in masks])


def spans(masks):
    """Height by width, as a logarithm, of the box around each island."""
    boxes = [box for mask in masks for box in ndimage.find_objects(ndimage.label(mask)[0])]
    return np.log([(rows.stop - rows.start) / (columns.stop - columns.start) for rows, columns in boxes])


def shares(masks):
    return masks.mean((1, 2))


MEASURES = [shares, outline, islands, spans]


@each("measure", MEASURES)
def test_masks_are_distributed_as_the_official_loaders(measure, official):
    assert stats.ks_2samp(measure(drawn()), measure(official)).pvalue > 0.01


def test_every_place_is_hidden_as_often_as_by_the_official_loader(official):
    ours, theirs = drawn(), official
    assert abs(ours.mean() - theirs.mean()) < 0.01
    deviation = np.sqrt((ours.var(0) + theirs.var(0)) / VIEWS)
    assert np.abs((ours.mean(0) - theirs.mean(0)) / deviation).max() < 4.5  # of 196 places


@each(("measure", "config"), [(outline, {"shape": "random"}), (spans, {"aspect": (1.0, 1.0)}),
                              (spans, {"aspect": (0.3, 1.0)}), (shares, {"ratio": (0.1, 0.45)}),
                              (islands, {"ratio": (0.1, 0.4)})])
def test_the_comparison_tells_other_masks_from_the_official_ones(measure, config, official):
    assert stats.ks_2samp(measure(drawn(**config)), measure(official)).pvalue < 1e-4


def test_half_of_the_views_are_left_alone():
    alone = (~drawn().any((1, 2))).sum()
    assert stats.binomtest(int(alone), VIEWS, 0.5).pvalue > 0.01
    assert drawn(200, probability=1.0).any((1, 2)).all()
    assert not drawn(200, probability=0.0).any()


@each("side", [2, 3, 4, 7, 14, 28])
@each("ratio", [0.1, 0.37, 0.9])
def test_no_view_has_more_hidden_patches_than_were_asked_for(side, ratio):
    counts = drawn(100, side, probability=1.0, ratio=(ratio, ratio)).sum((1, 2))
    assert counts.max() <= ratio * side**2
    if side >= 7:
        assert counts.mean() > 0.8 * ratio * side**2 - 1


@each("ratio", [0.0, 0.3, 1.0])
def test_random_masks_have_exactly_the_number_of_patches(ratio):
    masks = drawn(300, 10, probability=1.0, ratio=(ratio, ratio), shape="random")
    assert (masks.sum((1, 2)) == math.floor(100 * ratio)).all()
    assert np.abs(masks.mean(0) - ratio).max() < 4.5 * math.sqrt(ratio * (1 - ratio) / 300) + 1e-9


def test_aspect_is_width_by_height():
    wide = drawn(300, probability=1.0, aspect=(2.5, 3.0))
    assert spans(wide).mean() < -0.3  # height by width


def test_rows_and_columns_may_differ():
    masks = draw_masks(np.random.default_rng(0), 500, 6, 12, MaskConfig(probability=1.0))
    assert masks.shape == (500, 72) and masks.dtype == np.bool_
    of_places = masks.reshape(500, 6, 12).mean(0)
    assert of_places.min() > 0.03
    assert np.abs(of_places - of_places[::-1, ::-1]).max() < 4.5 * math.sqrt(2 * 0.25 / 500)


def test_views_are_drawn_apart():
    masks = draw_masks(np.random.default_rng(1), 2 * VIEWS, 4, 4, MaskConfig()).reshape(VIEWS, 2, 16).any(-1)
    assert abs(np.corrcoef(masks.T)[0, 1]) < 0.05
