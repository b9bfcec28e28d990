"""Who may import whom, read from the source of every module: the layers of the design, and what stays lazy."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import patchssl

ROOT = Path(patchssl.__file__).parent
TESTS = Path(__file__).parent

# a module imports from its own layer and from those before it; a package stands for all its modules
LAYERS = [
    ["errors", "distributed", "hub", "wholefile", "progress"],
    ["geometry", "data", "textures", "imageset", "imagefile", "imageends", "arrayfile", "plainpickle",
     "listfile", "archive", "packed", "shards", "hubset", "timmset", "splits", "cachefolder", "unpack",
     "holdout", "videofile", "unreadable"],
    ["matching", "networks", "backbone", "weights", "layouts", "checkpoint", "loading", "timm_loading",
     "soundness"],
    ["pretrain", "eval"],
    ["report", "catalog", "inspection", "inspection_report", "reproduce"],
    ["export"],
    ["workflows", "tabling", "quickstart", "study", "drawing", "seen", "token_pairs", "attention_video", "console",
     "make_sets", "bench", "doctor", "suite", "scoring", "reporting", "bench_eval", "bench_step", "bench_training",
     "bench_report", "bench_timing", "suite_cells", "slurm",
     "photo_edits", "photo_intake", "strong_edits", "landmark_views",
     "download", "fetch_sets", "check_sets", "check_imagenet", "imagenet100"],
    ["commands", "cli", "__main__"],
]
LAYER_OF = {name: number for number, layer in enumerate(LAYERS) for name in layer}

# what is named in few files only, nested imports included
HOMES = {
    "torch.distributed": {"distributed.py"},
    "faiss": {"eval/faiss_index.py"},
    "matplotlib": {f"report/plots/{name}.py" for name in (
        "canvas", "attention", "components", "curves", "differences", "matches", "robustness", "token_matches",
        "video_frames", "views")},
    "jinja2": {"report/page.py"},
    "timm": {"networks.py", "data.py", "export/timm_folder.py"},
    "onnx": {"export/onnx_file.py"},
    "onnxruntime": {"export/onnx_file.py"},
    "huggingface_hub": {"hub.py"},
    "datasets": {"hubset.py"},
    "pyarrow": {"hubset.py"},
    "submitit": {"slurm.py"},
    "tensorboard": {"pretrain/board.py"},
    "av": {"videofile.py"},
    "filelock": {"study/place.py"},
}


def sources(root):
    """Every Python file below `root` by its name relative to it; links are not followed."""
    return {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in sorted(root.rglob("*.py"))}


def imported(tree):
    """Dotted names that a module imports anywhere: `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (str(given.value) for given in node.args if isinstance(given, ast.Constant))


MODULES = sources(ROOT)


def part_of(file):
    """errors.py -> errors, eval/knn.py -> eval, __init__.py -> None."""
    first = file.split("/")[0].removesuffix(".py")
    return None if first == "__init__" else first


def own_parts(tree):
    """The parts of this package that a module imports."""
    names = (name.split(".") for name in imported(tree))
    return {parts[1] for parts in names if parts[0] == "patchssl" and len(parts) > 1 and parts[1] in LAYER_OF}


def test_every_module_has_a_layer():
    assert {part for part in map(part_of, MODULES) if part} - set(LAYER_OF) == set()
    assert {"errors", "matching", "pretrain", "eval", "cli"} <= {part_of(file) for file in MODULES}


@pytest.mark.parametrize("file", MODULES)
def test_imports_point_to_earlier_layers(file):
    part = part_of(file)
    allowed = LAYER_OF[part] if part else -1
    assert {name for name in own_parts(MODULES[file]) if LAYER_OF[name] > allowed} == set()


@pytest.mark.parametrize(("package", "other"), [("eval", "pretrain"), ("pretrain", "eval")])
def test_pretrain_and_eval_never_import_each_other(package, other):
    files = [file for file in MODULES if part_of(file) == package]
    assert len(files) > 3
    assert [file for file in files if other in own_parts(MODULES[file])] == []


@pytest.mark.parametrize("library", HOMES)
def test_a_library_is_named_in_its_home_only(library):
    found = {file for file, tree in MODULES.items()
             if any(name == library or name.startswith(library + ".") for name in imported(tree))}
    assert found
    assert found <= HOMES[library]


def test_torch_distributed_is_not_reached_by_attribute_either():
    reached = {file for file, tree in MODULES.items() for node in ast.walk(tree)
               if isinstance(node, ast.Attribute) and node.attr == "distributed"
               and isinstance(node.value, ast.Name) and node.value.id == "torch"}
    assert reached <= HOMES["torch.distributed"]


@pytest.mark.parametrize("root", [ROOT, TESTS], ids=["package", "tests"])
def test_the_links_at_the_root_are_never_imported(root):
    """`import pretrain.x` would make a second copy of every module."""
    wrong = {(file, name) for file, tree in sources(root).items() for name in imported(tree)
             if name.split(".")[0] in ("pretrain", "eval", "")}
    assert wrong == set()


def test_no_module_imports_itself_through_others():
    """No circle of imports at the top of modules, where it would depend on which is imported first."""
    names = {file: "patchssl." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
             for file in MODULES if file != "__init__.py"}
    top = {names[file]: {name for node in MODULES[file].body for name in imported(ast.Module([node], []))
                         if isinstance(node, ast.Import | ast.ImportFrom)} & set(names.values())
           for file in names}
    done: set[str] = set()

    def visit(name, path):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            for below in top[name]:
                visit(below, [*path, name])
            done.add(name)

    for name in top:
        visit(name, [])
    assert len(done) == len(names)


HEAVY = {"torch", "torchvision", "timm", "faiss", "matplotlib", "sklearn", "pandas", "jinja2"}


def modules_after(code):
    """Names of the top-level packages that a fresh interpreter has loaded after `code`."""
    report = "\nimport json, sys\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT.parent), "CI": ""})
    return set(json.loads(result.stdout.splitlines()[-1]))


HELP = "import sys\nsys.argv = ['patchssl', '--help']\nfrom patchssl.cli import main\n" \
       "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code"


@pytest.mark.parametrize("code", ["import patchssl", "import patchssl.cli", "from patchssl import pretrain", HELP],
                         ids=["patchssl", "patchssl.cli", "patchssl.pretrain", "--help"])
def test_what_must_answer_at_once_imports_nothing_heavy(code):
    loaded = modules_after(code)
    assert "patchssl" in loaded
    assert loaded & HEAVY == set()
