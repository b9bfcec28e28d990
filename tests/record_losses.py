"""Record what the official losses say of logits that everybody can make: data/official_losses.npz.

    python tests/record_losses.py DINO IBOT PWSELF WORKING

The arguments are clones of facebookresearch/dino, bytedance/ibot, alijavidani/Local_Global_Representation_Learning and
alijavidani/dino, the last two by PW-Self's authors; in the latter, two commits weigh class token and matches otherwise.
Three updates in a row each, centers carried over. Tests read inputs and sizes from here; they need no clone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import types
from itertools import product
from pathlib import Path

import numpy as np
from record_official import filled, imported

LOSSES = Path(__file__).parent / "data" / "official_losses.npz"
UPDATES = 3
IMAGES, GLOBALS, LOCALS = 3, 2, 3
PROTOTYPES = 12
SEPARATE = 7  # prototypes of patches, where they have a head of their own
SIDE = 4  # patches of a global view of iBOT
STUDENT_TEMP = 0.1
TEMPS, PATCH_TEMPS = (0.04, 0.055, 0.07), (0.03, 0.05, 0.07)  # of the teacher, per update
PATCH_WEIGHT = 0.6  # lambda2
PATCH = 32  # pixels, of PW-Self: its loss knows views of 224 pixels only
BOXES = ((0, 0, 200, 180), (40, 60, 160, 200), (30, 50, 60, 60), (0, 200, 50, 40), (110, 120, 70, 64))
MIRRORED = (False, True, False, True, True)
LAMBDA = "1cb4878"  # of alijavidani/dino, head of QCRI_Cifar10
LAMBDA_SUM = "f35bf24"  # the head of QCRI_ImageNet_same_batch_augmentation
CLASS_SHARES = {"lambda": 0.9, "lambda-sum": 0.8}  # as these commits have it


def logits(name, update, *shape):
    """Between -1 and 1, as logits of unit vectors."""
    return np.clip(4 * filled(f"logits {name} {update}", shape), -1, 1)


def masks(update):
    """(IMAGES, GLOBALS, SIDE, SIDE) bool: one view of three without, one all masked."""
    found = filled(f"mask {update}", (IMAGES, GLOBALS, SIDE, SIDE)) > 0.4
    found[0, update % 2], found[1, 1] = False, update == 1
    return found


def pwself_sizes():
    """Tokens of a global and of a local view, the class token with them."""
    return 1 + (224 // PATCH) ** 2, 1 + (96 // PATCH) ** 2


def own_boxes(image):
    """The boxes of an image that has its own: those of the batch, given to other views."""
    order = [(v + image) % GLOBALS for v in range(GLOBALS)] + [GLOBALS + (v + image) % LOCALS for v in range(LOCALS)]
    return tuple(BOXES[v] for v in order)


def by_view(array):
    """(B, V, ...) as the official code has it: (V * B, ...), all images of the first view first."""
    import torch

    return torch.from_numpy(array).transpose(0, 1).flatten(0, 1).contiguous()


def module(clone, file):
    """The training script `file` of a `clone`, with what only its tables and logs need left out."""
    stubs = {"tensorboardX": "SummaryWriter", "timm.models.registry": "register_model", "models": "none",
             "models.head": "iBOTHead", "evaluation": "none", "evaluation.unsupervised": "none",
             "evaluation.unsupervised.unsup_cls": "eval_pred"}
    for name in ("utils", "vision_transformer", "augment", "loader"):
        sys.modules.pop(name, None)
    for name, attribute in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        setattr(sys.modules[name], attribute, None)
    return imported(clone, file)


def dino_updates(script):
    loss = script.DINOLoss(PROTOTYPES, GLOBALS + LOCALS, TEMPS[0], TEMPS[-1], UPDATES, UPDATES + 1, STUDENT_TEMP)
    for update in range(UPDATES):
        student = by_view(logits("student", update, IMAGES, GLOBALS + LOCALS, PROTOTYPES))
        value = loss(student, by_view(logits("teacher", update, IMAGES, GLOBALS, PROTOTYPES)), update)
        yield f"dino/{update}", {"loss": value, "center": loss.center}


def ibot_updates(script, name, prototypes):
    import torch

    loss = script.iBOTLoss(PROTOTYPES, prototypes, GLOBALS, LOCALS, TEMPS[0], TEMPS[-1], PATCH_TEMPS[0],
                           PATCH_TEMPS[-1], UPDATES, UPDATES + 1, STUDENT_TEMP, lambda2=PATCH_WEIGHT)
    for update in range(UPDATES):
        student = logits("student", update, IMAGES, GLOBALS + LOCALS, PROTOTYPES)
        ours = {who: by_view(logits(f"{who} patches", update, IMAGES, GLOBALS, SIDE**2, prototypes))
                for who in ("student", "teacher")}
        teacher = by_view(logits("teacher", update, IMAGES, GLOBALS, PROTOTYPES))
        hidden = list(torch.from_numpy(masks(update)).unbind(1))
        found = loss((by_view(student[:, :GLOBALS]), ours["student"]), (teacher, ours["teacher"]),
                     by_view(student[:, GLOBALS:]), hidden, update)
        yield f"{name}/{update}", found | {"center": loss.center, "patch_center": loss.center2[0]}


def crops_of(boxes, mirrored, patch):
    """What the authors' code knows of the views of one image; boxes are (top, left, height, width)."""
    sizes = [224] * GLOBALS + [96] * (len(boxes) - GLOBALS)
    return [types.SimpleNamespace(
        original_image="the same", patch_size=patch, patches_per_side=size // patch, flip=flip,
        crop_coordinates=types.SimpleNamespace(top=box[0], left=box[1], bottom=box[0] + box[2], right=box[1] + box[3]))
        for size, box, flip in zip(sizes, boxes, mirrored, strict=True)]


def correspondences(script, boxes, mirrored, patch):
    """The authors' matches of patches of views of one image, pair by pair; boxes are (top, left, height, width)."""
    crops = crops_of(boxes, mirrored, patch)
    pairs = [[None] * len(crops) for _ in range(GLOBALS)]
    for t, s in product(range(GLOBALS), range(len(crops))):
        pairs[t][s] = script.correspondences(crops[t], crops[s]) if t != s else None
    return pairs


def pwself_updates(script, name):
    """As the authors' collate function does it, all images of a batch share one geometry."""
    pairs = correspondences(script, BOXES, MIRRORED, PATCH)
    loss = script.DINOLoss(PATCH, PROTOTYPES, len(BOXES), TEMPS[0], TEMPS[-1], UPDATES, UPDATES + 1, STUDENT_TEMP)
    for update in range(UPDATES):
        of_globals, of_locals = pwself_sizes()
        value = loss(by_view(logits("student globals", update, IMAGES, GLOBALS, of_globals, PROTOTYPES)),
                     by_view(logits("student locals", update, IMAGES, LOCALS, of_locals, PROTOTYPES)),
                     by_view(logits("teacher", update, IMAGES, GLOBALS, of_globals, PROTOTYPES)), pairs, update)
        yield f"{name}/{update}", {"loss": value, "center": loss.center[0, :1], "patch_center": loss.center[0, 1:]}


def lambda_updates(script, name):
    """As this commit does it, every image has its own geometry, and local views have as many tokens as global ones."""
    import torch

    data = [crops_of(own_boxes(image), MIRRORED, PATCH) for image in range(IMAGES)]
    loss = script.DINOLoss(PATCH, PROTOTYPES, len(BOXES), TEMPS[0], TEMPS[-1], UPDATES, UPDATES + 1, STUDENT_TEMP)
    for update in range(UPDATES):
        of_globals, of_locals = pwself_sizes()
        local = by_view(logits("student locals", update, IMAGES, LOCALS, of_locals, PROTOTYPES))
        padded = torch.nn.functional.pad(local, (0, 0, 0, of_globals - of_locals))
        whole = by_view(logits("student globals", update, IMAGES, GLOBALS, of_globals, PROTOTYPES))
        value = loss(torch.cat([whole, padded]),
                     by_view(logits("teacher", update, IMAGES, GLOBALS, of_globals, PROTOTYPES)), data, update)
        yield f"{name}/{update}", {"loss": value, "center": loss.center[0, :1], "patch_center": loss.center[0, 1:]}


def script_at(clone, commit):
    """The training script of a `commit` of a `clone`, which may be bare."""
    with tempfile.TemporaryDirectory(suffix=commit) as folder:
        for file in ("main_dino.py", "utils.py", "vision_transformer.py", "augment.py"):
            text = subprocess.run(["git", "-C", str(clone), "show", f"{commit}:{file}"], check=True,
                                  stdout=subprocess.PIPE).stdout
            Path(folder, file).write_bytes(text)
        return module(Path(folder), "main_dino.py")


def main(clones):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dino, ibot, pwself = map(module, clones[:3], ("main_dino.py", "main_ibot.py", "patch_wise_dino.py"))
    record = {}
    for updates in (dino_updates(dino), ibot_updates(ibot, "ibot", PROTOTYPES),
                    ibot_updates(ibot, "ibot_separate", SEPARATE), pwself_updates(pwself, "pwself"),
                    lambda_updates(script_at(clones[3], LAMBDA), "pwself lambda"),
                    pwself_updates(script_at(clones[3], LAMBDA_SUM), "pwself lambda-sum")):
        for name, found in updates:
            record |= {f"{name}/{what}": tensor.numpy().copy() for what, tensor in found.items()}
    dist.destroy_process_group()
    np.savez_compressed(LOSSES, **record)
    print(f"{LOSSES}: {len(record)} values, {LOSSES.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main([Path(clone).resolve() for clone in sys.argv[1:5]])
