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

# the packages, floor by floor: each may import those of the floors before it
FLOORS = [["runtime"], ["views"], ["data", "models"], ["sets", "pretrain"], ["eval"], ["report"],
          ["export", "workflows", "bench"], ["study"], ["cli"], ["__main__"]]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}

# what is named in few files only, nested imports included
HOMES = {
    "torch.distributed": {"runtime/distributed.py"},
    "faiss": {"eval/faiss.py"},
    "matplotlib": {f"report/plots/{name}.py" for name in (
        "canvas", "attention", "pca", "curves", "differences", "library", "matches", "robustness", "tokens", "frames",
        "views")},
    "jinja2": {"report/page/render.py"},
    "timm": {"models/networks.py", "data/open.py", "export/timm.py"},
    "onnx": {"export/onnx.py"},
    "onnxruntime": {"export/onnx.py"},
    "huggingface_hub": {"models/hub.py"},
    "datasets": {"data/huggingface.py"},
    "pyarrow": {"data/huggingface.py"},
    "submitit": {"workflows/slurm.py"},
    "tensorboard": {"pretrain/run/log.py"},
    "av": {"report/figures/videofile.py"},
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


def package_of(file):
    """eval/knn.py -> eval, __main__.py -> __main__."""
    return file.split("/")[0].removesuffix(".py")


def test_packages_import_earlier_floors_only():
    assert {package_of(file) for file in MODULES} == {"__init__", *FLOOR_OF}
    for file, tree in MODULES.items():
        package = package_of(file)
        for other in {name.split(".")[1] for name in imported(tree) if name.startswith("patchssl.")} - {package}:
            assert package != "__init__" or other == "runtime", f"{file} imports {other}: it is to stay light"
            assert package == "__init__" or other == "__version__" or FLOOR_OF[other] < FLOOR_OF[package], (
                f"{file} imports {other}, which does not stand on a floor below {package}")


def test_the_house_stays_small():
    entries = sorted(path.name for path in ROOT.iterdir() if path.name != "__pycache__")
    assert len(entries) <= 16, entries
    assert len(FLOORS) <= 10
    long = {file: len((ROOT / file).read_text().splitlines()) for file in MODULES}
    assert {file: lines for file, lines in long.items() if lines > 330} == {}
    assert [f"{file}: {node.name}" for file, tree in MODULES.items() for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 40] == []


def test_every_class_name_has_one_meaning():
    homes = {}
    for file, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name.strip("_"), []).append(file)
        for node in tree.body:  # Name = Callable[...], Name = Literal[...]
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id.strip("_")
                if name != name.upper() and name[0].isupper():
                    homes.setdefault(name, []).append(file)
    assert len(homes) > 200
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


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
                         if isinstance(node, ast.Import | ast.ImportFrom)} & set(names.values()) - {names[file]}
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
