"""What the engine makes of the views of a batch under each kind of patch-wise color, and how many kernels it takes."""

from collections import Counter

import numpy as np
import torch
import torchvision.transforms.functional as tv
from cases import each
from small_runs import make_batch, make_recipe
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from patchssl.pretrain.engine import color_views
from patchssl.views.color import ColorDraws
from patchssl.views.patchcolor import PatchDraws
from patchssl.views.plaincolor import color_view

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CPU, THERE = torch.device("cpu"), torch.device("meta")  # the latter stands for a GPU: shapes and no values
MORE = 60  # kernels at most that layered patch-wise color may launch for a batch
FREE = {"view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "select", "slice", "split",
        "split_with_sizes", "unbind", "unsqueeze", "squeeze", "detach", "alias", "as_strided", "unfold", "view_as",
        "_reshape_alias", "lift_fresh", "narrow", "empty", "empty_like", "new_empty", "empty_strided",
        "new_empty_strided", "diagonal"}  # make views or memory, and launch nothing


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given, by name; copies from the CPU are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.copies = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        name, inputs = function._schema.name.split("::")[1], [x for x in tree_leaves((args, kwargs))
                                                              if isinstance(x, torch.Tensor)]
        if any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves(given)):
            if name == "_to_copy" and not inputs[0].is_meta:
                self.copies += 1
            elif name not in FREE:
                self.kernels[name] += 1
        return given


def launches(num_local: int = 8, **photometric) -> Launches:
    """Of the color of 2 global and some local views of 6 images, patches of 16 pixels."""
    recipe = make_recipe(photometric=photometric, model={"patch_size": 16},
                         views={"num_local": num_local, "global_size": 64, "local_size": 32})
    batch = make_batch(recipe).to(THERE)
    with Launches() as counted:
        globals_, locals_ = color_views(batch, recipe, THERE)
    assert globals_.shape == (6, 2, 3, 64, 64) and locals_.shape == (6, num_local, 3, 32, 32)
    return counted


def test_what_launches_a_kernel_is_counted() -> None:
    with Launches() as counted:
        there = torch.ones(4).to(THERE, non_blocking=True)
        there.view(2, 2).t()[0].add_(1).mul(there.new_empty(2))
        torch.ones(2) + 1
    assert counted.kernels == {"add_": 1, "mul": 1} and counted.copies == 1


def test_layered_color_takes_few_more_kernels_than_none() -> None:
    layered, none = launches(), launches(patchwise="none")
    more, kernels = layered.kernels.total() - none.kernels.total(), layered.kernels - none.kernels
    assert none.kernels.total() > 20
    assert more <= MORE, f"{more} more kernels than without, {dict(kernels.most_common())}"
    assert more > 5, more  # it is counted at all
    assert layered.copies - none.copies <= 4, (layered.copies, none.copies)


def test_more_views_take_no_more_kernels() -> None:
    more = [launches(num).kernels.total() - launches(num, patchwise="none").kernels.total() for num in (8, 16)]
    assert more[0] == more[1]


def of_view(draws, image: int, view: int):
    return type(draws)(*(field[image, view] for field in draws))


@each("photometric", [{}, {"patch_share": 0.5}, {"patch": {"jitter": 0.5, "blur": 0.5, "hue": 0.5}},
                      {"patchwise": "replace"}, {"patchwise": "replace", "patch_share": 0.5}, {"patchwise": "none"},
                      {"patch_share": 0}])
def test_the_views_of_a_batch_are_colored_as_the_plain_form_then_normalized(photometric) -> None:
    recipe = make_recipe(photometric=photometric)
    batch = make_batch(recipe)
    layered = recipe.patch_color == "layered"
    for found, views, colors, patches in zip(
            color_views(batch, recipe, CPU), (batch.global_views, batch.local_views),
            (batch.global_colors, batch.local_colors), (batch.global_patches, batch.local_patches), strict=True):
        assert isinstance(colors, ColorDraws) and isinstance(patches, PatchDraws) and found.shape == views.shape
        off = []
        for image, view in np.ndindex(views.shape[:2]):
            plain = color_view(views[image, view] / 255, of_view(colors, image, view), 8,
                               of_view(patches, image, view) if layered else None)
            off.append((found[image, view] - tv.normalize(plain, MEAN, STD)).abs())
        off = torch.stack(off)
        if layered:  # a value on the edge of a level may fall to the other side, and posterization makes more of it
            assert (off > 1e-4).float().mean() < 5e-3, (off > 1e-4).float().mean()
        else:
            assert off.max() < 1e-3


def test_kinds_of_patch_wise_color_differ() -> None:
    every = {mode: color_views(make_batch(recipe), recipe, CPU)[0] for mode in ("layered", "replace", "none")
             for recipe in [make_recipe(photometric={"patchwise": mode})]}
    assert len({float(views.double().sum()) for views in every.values()}) == 3
    mild, harsh = ((every[mode] - every["none"]).abs().mean() for mode in ("layered", "replace"))
    assert 0.01 < mild < harsh
