"""docs/architecture.md names files and functions that exist, and its picture has every package on its floor."""

import ast
import re
from pathlib import Path

import patchssl

ROOT = Path(patchssl.__file__).parents[1]
PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
STEP = re.compile(r"^\| .* \| `(patchssl/\S+\.py)` \| `([\w.]+)` \|$", re.MULTILINE)


def defined(path):
    """Functions and classes of a module, methods as Class.method."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
            yield from (f"{node.name}.{part.name}" for part in getattr(node, "body", [])
                        if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef))


def test_every_step_of_the_walks_is_a_function_that_exists():
    steps = STEP.findall(PAGE.read_text())
    assert len(steps) > 30
    assert [step for step in steps if step[1] not in set(defined(ROOT / step[0]))] == []


def test_every_path_of_the_page_exists():
    named = set(re.findall(r"`((?:patchssl|tests)/[\w./]*)`", PAGE.read_text()))
    assert len(named) > 30
    assert [name for name in named if not (PAGE.parents[1] / name).exists()] == []


def test_each_walk_has_its_own_section():
    text = PAGE.read_text()
    for walk, first, last in (("One image", "open_images", "train"), ("One MODEL", "knn", "make_tables")):
        steps = STEP.findall(text[text.index(f"## {walk}"):].split("\n## ")[0])
        assert len(steps) > 15
        assert (steps[0][1], steps[-1][1]) == (first, last)


def test_the_picture_has_every_package():
    picture = (PAGE.parent / "architecture.svg").read_text()
    packages = {path.name for path in (ROOT / "patchssl").iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r'class="name">(\w+)<', picture)) == packages
    assert len(packages) == 13
