"""The list of formulas in `patchssl.pretrain` names what is there, and its plain forms are short."""

import inspect
import re
from pkgutil import resolve_name

import patchssl.pretrain

NAMES = re.findall(r"\b(?:views|pretrain)(?:\.\w+){2,}", patchssl.pretrain.__doc__)
PLAIN = ["pretrain.centering.ema_center", "pretrain.centering.sinkhorn", "pretrain.centering.teacher_probs",
         "pretrain.losses.pair_losses", "pretrain.losses.pwself_loss", "views.plaincolor.color_view"]
PARTS = [f"views.plaincolor.{part}" for part in ("change_patch", "change_patches", "replace_patches", "color_whole",
                                                 "recolor", "solarize", "blur")]


def test_the_list_names_what_can_be_called():
    assert set(PLAIN) <= set(NAMES) and len(NAMES) > 20
    assert [name for name in NAMES if not callable(resolve_name(f"patchssl.{name}"))] == []


def test_plain_forms_have_at_most_30_lines():
    lines = {name: len(inspect.getsource(resolve_name(f"patchssl.{name}")).splitlines()) for name in PLAIN + PARTS}
    assert {name: number for name, number in lines.items() if number > 30} == {}
