"""The teacher follows the student, and no gradient reaches it."""

import copy

import torch
from torch import nn

from patchssl.pretrain.teacher import make_teacher, update_teacher


def test_teacher_moves_towards_the_student():
    student = nn.Linear(2, 2)
    teacher = make_teacher(student)
    before = copy.deepcopy(teacher.weight)
    student.weight.data += 1.0
    update_teacher(teacher, student, momentum=0.9)
    torch.testing.assert_close(teacher.weight, before + 0.1)
    assert not any(p.requires_grad for p in teacher.parameters())
