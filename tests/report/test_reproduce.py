"""The page on meeting published numbers: made of the catalog, its commands exist, its numbers are those printed."""

import itertools
import re
import shlex
from pathlib import Path

import typer
from cases import each

from patchssl.cli import build_app
from patchssl.eval.copydays import copydays_protocol
from patchssl.eval.linear.task import linear_protocol
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.revisited.task import revisited_protocol
from patchssl.models.load import load_backbone
from patchssl.report.catalog import known_models
from patchssl.report.reproduce import BENCHES, as_markdown, targets
from patchssl.report.tables.published import read_published
from patchssl.sets.fetch import SETS

RESULTS = Path(__file__).parents[2] / "results"
COMMANDS = [line.partition(" #")[0].strip() for file in ("REPRODUCE.md", "README.md")
            for block in re.findall(r"```sh\n(.*?)```", (RESULTS / file).read_text("utf-8"), re.DOTALL)
            for line in block.splitlines() if line.startswith("patchssl ")]


def test_the_committed_page_is_what_the_package_says():
    assert (RESULTS / "REPRODUCE.md").read_text("utf-8") == as_markdown()


def test_every_public_network_with_a_covered_number_has_its_commands():
    found = {(target.model.name, metric): sorted({round(number.value, 4) for number in numbers})
             for target in targets() for metric, numbers, _ in target.expected if "revisited" not in target.command}
    assert found["DINO ViT-S/16", "top1@20"] == [0.745] and found["DINO ViT-S/16", "top1"] == [0.77]
    assert found["DINO ViT-B/8", "strong/map"] == [0.855, 0.858]
    assert found["iBOT ViT-B/16", "top1@20"] == [0.771] and found["iBOT ViT-B/16", "top1"] == [0.795]
    assert {"DINO ViT-S/8", "DINO ViT-B/16", "iBOT ViT-S/16", "iBOT ViT-L/16"} <= {name for name, _ in found}
    retrieval = {(target.model.name, target.command.split("--set ")[1]) for target in targets()
                 if "revisited" in target.command}
    assert {("DINO ViT-S/16", "roxford5k --protocol dino"), ("iBOT ViT-S/16", "rparis6k --protocol ibot")} <= retrieval
    assert {number for target in targets() for _, numbers, _ in target.expected
            for number in numbers} <= set(read_published())
    assert set(BENCHES) <= {row.benchmark for row in read_published()}


def test_files_of_one_name_are_kept_apart():
    files = [target.command.split()[3] for target in targets() if target.command.split()[3].endswith(".pth")]
    models = {target.model.name for target in targets() if not target.model.uri}
    assert len(set(files)) == len(models) > 5
    assert all(f"curl --create-dirs -o {file} https://" in as_markdown() for file in files)


@each("line", sorted(set(COMMANDS)))
def test_every_command_parses(line):
    """Up to the call of the function: unknown commands, options and wrong kinds of value are refused there."""
    command, rest = typer.main.get_command(build_app()), shlex.split(line)[1:]
    context = command.make_context("patchssl", rest)
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    assert context.args == []


def test_protocols_sets_and_networks_of_the_commands_exist():
    assert len(COMMANDS) > 40
    network = load_backbone("random:vit_tiny_patch16_224?depth=4")
    for words in map(shlex.split, COMMANDS):
        given = dict(itertools.pairwise(words))
        if words[1:3] == ["data", "get"]:
            assert words[3] in SETS
        if words[1] == "eval" and "--protocol" in given:
            name = given["--protocol"]
            found = {"knn": lambda name, _: knn_protocol(name, 224),
                     "linear": lambda name, _: linear_protocol(name, network),
                     "copydays": lambda name, _: copydays_protocol(name, network),
                     "revisited": lambda name, of: revisited_protocol(name, network, of)}[words[2]]
            assert found(name, given.get("--set", "")).name == name
        if words[1] == "eval" and words[3].startswith("timm:"):
            assert words[3] in {model.uri for model in known_models()}
