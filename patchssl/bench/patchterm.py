"""Time and memory of parts of a training step beside the plain way, in one run; JSON-able out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from patchssl.bench.timing import Candidate, machine, median_times
from patchssl.pretrain.centering import teacher_probs
from patchssl.pretrain.crossentropy import GroupedMatches, TeacherTokens, group_matches, matched_cross_entropy
from patchssl.pretrain.losses import matched_loss
from patchssl.runtime.device import peak_memory
from patchssl.runtime.errors import PatchSSLError

BOTTLENECK, STUDENT_TEMP, TEACHER_TEMP = 256, 0.1, 0.04
PER_IMAGE = {"student tokens": 218, "teacher tokens": 189, "matches": 273}  # 2 + 8 views, 16 matches a pair at most
MIB = 2**20
WAYS = ("ours", "plain")
T = TypeVar("T")


class PatchTerm(NamedTuple):
    """Inputs of the patch term; see `patchssl.pretrain.crossentropy`."""

    bottleneck: Tensor
    prototypes: Tensor
    teacher: TeacherTokens
    groups: GroupedMatches
    student_rows: Tensor
    teacher_rows: Tensor
    weight: Tensor

    def ours(self) -> Tensor:
        """The loss in pieces."""
        return matched_cross_entropy(self.bottleneck, self.prototypes, self.teacher, self.groups, self.teacher_rows,
                                     self.weight, STUDENT_TEMP)[0]

    def plain(self) -> Tensor:
        """The loss by autograd, with whole matrices of logits, probabilities and targets."""
        teacher = self.teacher
        probs = teacher_probs(F.linear(teacher.bottleneck, teacher.prototypes), teacher.center, teacher.temp)
        return matched_loss(F.linear(self.bottleneck, self.prototypes), probs, self.student_rows, self.teacher_rows,
                            self.weight, STUDENT_TEMP)

    def update(self, way: str) -> list[Tensor]:
        """Value and both gradients by the method of that name."""
        loss = getattr(self, way)()
        return [loss.detach(), *torch.autograd.grad(loss, (self.bottleneck, self.prototypes))]


def bench_patch_term(num_prototypes: int = 65_536, num_images: int = 8, repeats: int = 3,
                     device: str = "cpu") -> dict[str, Any]:
    """Seconds and MiB of head and loss of the patch term, value and gradients, ours and plain autograd's.

    As many random tokens and matches as 2 x 224 + 8 x 96 px views have at patch 16 with 16 matches a pair at most.
    On a CPU processor seconds of one thread and growth of the resident memory, each way in a process of its own;
    needs Linux there.
    """
    term = make_patch_term(num_prototypes, num_images, torch.device(device))
    differences = [float((a - b).norm() / b.norm())
                   for a, b in zip(term.update("ours"), term.update("plain"), strict=True)]
    candidates = {way: Candidate(partial(_update, term, way)) for way in WAYS}
    seconds = median_times(candidates, repeats) if device == "cpu" else _device_times(candidates, repeats)
    memory = {way: apart(term_memory, way, num_prototypes, num_images, device) for way in WAYS}
    return {
        "what": f"patch term of {num_images} images over {num_prototypes:,} prototypes, forward and backward",
        "tokens": {name: count * num_images for name, count in PER_IMAGE.items()},
        "seconds": seconds,
        "MiB": memory,
        "of plain autograd": {"time": seconds["ours"] / seconds["plain"], "memory": memory["ours"] / memory["plain"]},
        "aims": {"time, at most": 0.6, "memory, at most": 0.125},
        "relative difference": dict(zip(("value", "gradient of tokens", "gradient of prototypes"), differences,
                                        strict=True)),
        "repeats": repeats,
        "machine": machine() | ({} if device == "cpu" else {"device": torch.cuda.get_device_name(device)}),
    }


def make_patch_term(num_prototypes: int, num_images: int, device: torch.device) -> PatchTerm:
    """Random unit vectors and matches on `device`; every student token has one match, some have two."""
    rng = torch.Generator().manual_seed(0)
    students, teachers, matches = PER_IMAGE.values()
    student_image, teacher_image = (torch.arange(num_images).repeat_interleave(n) for n in (students, teachers))
    more = torch.stack([torch.randperm(students, generator=rng)[: matches - students] for _ in range(num_images)])
    student_rows = torch.cat([torch.arange(num_images * students),
                              (more + students * torch.arange(num_images)[:, None]).flatten()])
    teacher_rows = teachers * student_image[student_rows] + torch.randint(teachers, student_rows.shape, generator=rng)

    def unit(count: int) -> Tensor:
        vectors = torch.randn(count, BOTTLENECK, generator=rng)
        return vectors.div_(vectors.norm(dim=1, keepdim=True)).to(device)

    teacher = TeacherTokens(unit(num_images * teachers), unit(num_prototypes),
                            (0.1 * torch.randn(1, num_prototypes, generator=rng)).to(device), TEACHER_TEMP)
    weight = torch.full(student_rows.shape, 1 / len(student_rows), device=device)
    groups = group_matches(student_rows, student_image, teacher_image).to(device)
    return PatchTerm(unit(num_images * students).requires_grad_(), unit(num_prototypes).requires_grad_(), teacher,
                     groups, student_rows.to(device), teacher_rows.to(device), weight)


def _update(term: PatchTerm, way: str, _turn: int) -> list[Tensor]:
    return term.update(way)


def _device_times(candidates: Mapping[str, Candidate], repeats: int) -> dict[str, float]:
    """Seconds by the clock on an accelerator, median over `repeats` turns."""
    def seconds(run: Callable[[int], object], turn: int) -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        run(turn)
        torch.cuda.synchronize()
        return time.perf_counter() - began

    times = [{name: seconds(candidate.run, turn) for name, candidate in candidates.items()}
             for turn in range(repeats + 1)][1:]  # the first turn pays for set-up
    return {name: sorted(turn[name] for turn in times)[repeats // 2] for name in candidates}


def apart(measure: Callable[..., T], *arguments: Any) -> T:
    """What the function `measure` says in a process that does nothing else; arguments and answer travel as JSON."""
    code = (f"import json, sys; from {measure.__module__} import {measure.__name__} as measure; "
            "print(json.dumps(measure(*json.loads(sys.argv[1]))))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, json.dumps(arguments)], capture_output=True,
                          text=True, check=False)
    if done.returncode:
        raise PatchSSLError(f"{measure.__name__} of {arguments} failed: {done.stderr.strip().splitlines()[-1:]}")
    answer: T = json.loads(done.stdout.splitlines()[-1])
    return answer


def term_memory(way: str, num_prototypes: int, num_images: int, device: str) -> float:
    """MiB that one value and its gradients need at their peak beyond the inputs; for a fresh process, on one thread."""
    torch.set_num_threads(1)
    term = make_patch_term(num_prototypes, num_images, torch.device(device))
    small = make_patch_term(64, 1, torch.device(device))
    small.update(way)  # what libraries set up once is nobody's
    before = peak_so_far(torch.device(device))
    term.update(way)
    return peak_so_far(torch.device(device)) - before


def peak_so_far(device: torch.device) -> float:
    """`peak_memory` in MiB."""
    return peak_memory(device) / MIB
