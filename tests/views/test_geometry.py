import pytest
import torch
from cases import each

from patchssl.views.geometry import Crops, View, patch_at, patch_centers, patches_per_side


def crops(*boxes: tuple[float, float, float, float], mirrored: bool = False, size: int = 32) -> Crops:
    return Crops.of([View(*box, mirrored, size) for box in boxes])


@each("height, width, size", [(0, 5, 32), (5, 0, 32), (5, -1, 32), (5, 5, 0)])
def test_a_view_without_pixels_is_refused(height, width, size):
    with pytest.raises(ValueError, match="holds no pixel"):
        View(0, 0, height, width, False, size)


def test_a_view_contains_its_first_edge_and_not_its_last():
    view = View(2, 3, 4, 5, False, 32)
    y = torch.tensor([2.0, 5.99, 6.0, 2.0, 2.0, 1.99])
    x = torch.tensor([3.0, 7.99, 3.0, 8.0, 2.99, 3.0])
    assert view.contains(y, x).tolist() == [True, True, False, False, False, False]


def test_crops_keep_order_and_refuse_mixed_sizes():
    batch = Crops.of([View(1, 2, 3, 4, False, 32), View(5, 6, 7, 8, True, 32)])
    assert batch.boxes.tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert batch.mirrored.tolist() == [False, True]
    assert batch.size == 32
    with pytest.raises(ValueError, match=r"\[32, 64\]"):
        Crops.of([View(0, 0, 1, 1, False, 32), View(0, 0, 1, 1, False, 64)])


@each("size, patch_size, expected", [(224, 16, 14), (96, 32, 3), (8, 8, 1)])
def test_patches_per_side(size, patch_size, expected):
    assert patches_per_side(size, patch_size) == expected


@each("size, patch_size", [(224, 15), (8, 16), (8, 0), (0, 8)])
def test_views_that_are_no_whole_number_of_patches_are_refused(size, patch_size):
    with pytest.raises(ValueError, match="whole number of patches"):
        patches_per_side(size, patch_size)


def test_patch_centers_are_row_major_and_follow_the_mirror():
    # a crop of 8 x 4 source pixels at (10, 20), 2 x 2 patches: centers at 10 + {2, 6} and 20 + {1, 3}
    y, x = patch_centers(crops((10, 20, 8, 4)), patch_size=16)
    assert y.tolist() == [[12, 12, 16, 16]]
    assert x.tolist() == [[21, 23, 21, 23]]
    y, x = patch_centers(crops((10, 20, 8, 4), mirrored=True), patch_size=16)
    assert y.tolist() == [[12, 12, 16, 16]]
    assert x.tolist() == [[23, 21, 23, 21]]


def test_patch_at_on_borders_and_outside():
    y = torch.tensor([[10.0, 13.99, 14.0, 17.99, 18.0, 9.99]], dtype=torch.float64)
    x = torch.tensor([[20.0, 22.0, 21.99, 23.99, 20.0, 20.0]], dtype=torch.float64)
    assert patch_at(crops((10, 20, 8, 4)), y, x, 16).tolist() == [[0, 1, 2, 3, -1, -1]]
    assert patch_at(crops((10, 20, 8, 4), mirrored=True), y, x, 16).tolist() == [[1, 0, 3, 2, -1, -1]]


def test_patch_borders_in_whole_pixels_belong_to_the_patch_that_begins_there():
    # 49 patches over 49 pixels: 29 / 49 * 49 is below 29 in floats
    edges, zeros = torch.arange(49, dtype=torch.float64), torch.zeros(49, dtype=torch.float64)
    ids = patch_at(crops((0, 0, 49, 49), size=49), edges, zeros, 1)
    assert ids.tolist() == [[49 * i for i in range(49)]]


@each("patch_size", [8, 16, 32])
@each("mirrored", [False, True])
def test_every_center_lies_in_its_own_patch(patch_size, mirrored):
    generator = torch.Generator().manual_seed(patch_size)
    boxes = torch.randint(1, 500, (2, 50, 4), generator=generator).double()
    batch = Crops(boxes, torch.full((2, 50), mirrored), 224)
    ids = patch_at(batch, *patch_centers(batch, patch_size), patch_size)
    assert torch.equal(ids, torch.arange((224 // patch_size) ** 2).expand(2, 50, -1))
