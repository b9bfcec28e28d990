"""More than 2,000 inputs that nobody would write on purpose: none ends in a traceback, a hang, or a full memory."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from oddinput import VALUES, altered, as_json, bounded, damaged, many
from packing import pack, png

from patchssl.data.open import open_images
from patchssl.data.unreadable import find_unreadable
from patchssl.eval.records import Result, read_result
from patchssl.models.checkpoint import FORMAT, VERSION, load_checkpoint
from patchssl.models.inspect import inspect_model
from patchssl.models.load import load_backbone
from patchssl.pretrain.recipe import dump_recipe, load_recipe, parse_recipe
from patchssl.pretrain.run.resume import read_run
from patchssl.report.logs import read_run_log
from patchssl.report.tables.build import comparison_table
from patchssl.report.tables.vetting import objection
from patchssl.runtime import distributed
from patchssl.runtime.files import default_limit
from patchssl.sets.revisited import read_ground_truth

COUNTS = {
    "recipes": 300,
    "settings": 250,
    "lists": 250,
    "records": 300,
    "keys": 200,
    "weights": 150,
    "ground truths": 250,
    "archives": 200,
    "environments": 150,
    "run folders": 150,
}
RECIPE = yaml.safe_load(dump_recipe(load_recipe("quickstart")))
RECORD = {
    "format": "patchssl result",
    "schema": 1,
    "model": "m",
    "method": "dino",
    "arch": "vit",
    "task": "knn",
    "weights_sha256": "ab" * 32,
    "pretrain_data": None,
    "pretrain_epochs": 3,
    "dataset": "d",
    "seed": 1,
    "dataset_fingerprint": "cd" * 32,
    "protocol": "native",
    "protocol_version": 1,
    "variant": None,
    "protocol_settings": {"ks": [10, 20], "a": {"b": 1}},
    "protocol_fingerprint": "12" * 8,
    "device": "cpu",
    "metrics": {"top1@20": 0.5, "top5@20": 0.75},
    "versions": {"torch": "2"},
    "duration": 1.5,
    "detail": {
        "num_test": 4,
        "correct": {"top1@20": "f0"},
        "class_accuracy": {"a": 0.5},
        "network": {"sha256": "ab" * 32, "own_code": False},
    },
}
TRUTH = {
    "imlist": ["a", "b", "c"],
    "qimlist": ["q"],
    "gnd": [{"bbx": [1.0, 2.0, 30.0, 40.0], "easy": [0], "hard": np.array([1]), "junk": [2]}],
}
TENSORS = {
    "cls_token": (1, 1, 24),
    "pos_embed": (1, 17, 24),
    "patch_embed.proj.weight": (24, 3, 8, 8),
    "blocks.0.attn.qkv.weight": (72, 24),
    "blocks.0.mlp.fc1.weight": (96, 24),
    "norm.weight": (24,),
}
YAML_PIECES = [
    "a: &a [1, 1]",
    "b: [*a, *a]",
    "optim:",
    "  lr: 2020-13-45",
    "  epochs: !!python/object:os.system x",
    "? [a]",
    "<<: *a",
    "seed: .inf",
    "- x",
    "{",
    "[" * 40,
    "'",
    "\t",
    "optim: 3",
    "method: \x07",
    "%YAML 9",
    "a: !!binary x",
    "run: {threads: 0x1F}",
    "x: 12:30:45",
    "loss: {weighting: [balanced]}",
]


def test_two_thousand_inputs_are_tried():
    assert sum(COUNTS.values()) >= 2000


@many(COUNTS["recipes"])
@given(
    st.one_of(
        st.lists(st.sampled_from(YAML_PIECES), max_size=8).map("\n".join),
        st.text(max_size=200),
        altered(RECIPE).map(lambda values: yaml.dump(values, allow_unicode=False)),
    )
)
def test_recipes(text):
    with bounded():
        parse_recipe(text)


@many(COUNTS["settings"])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "optim.lr",
                    "optim",
                    "views.local_size",
                    "method",
                    "model.arch",
                    "seed",
                    "a.b",
                    "photometric.patch",
                    "",
                    "optim.lr.x",
                    "loss.weighting",
                    "data",
                ]
            ),
            st.one_of(
                st.sampled_from([*YAML_PIECES, "2020-13-45", "1e999", "[" * 2000, "&a [*a]", "{a: b"]),
                st.text(max_size=60),
            ),
        ).map("=".join),
        max_size=3,
    )
)
def test_settings_on_a_command_line(overrides):
    with bounded():
        load_recipe("quickstart", overrides)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a").mkdir()
    for name in ("a/1.png", "2.png"):
        (folder / name).write_bytes(png(1))
    return folder


def looked_at(path):
    """All of what a command sees of a set."""
    images = open_images(path)
    find_unreadable(images)
    assert len(images.describe()) < 5000
    assert images.fingerprint


@many(COUNTS["lists"])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        damaged(b"a/1.png\tcat\n2.png\tdog\n" * 2),
        st.lists(
            st.sampled_from(
                [
                    "a/1.png",
                    "2.png",
                    "../x",
                    "/dev/zero",
                    "\0",
                    "a\tb\tc",
                    "#",
                    "2.png 7",
                    "2.png\t-1",
                    "2.png\t" + "9" * 30,
                    "x" * 5000,
                    "~",
                    "a/1.png\t\x1b",
                ]
            ),
            max_size=6,
        ).map(lambda lines: "\n".join(lines).encode()),
    )
)
def test_lists(place, content):
    (place / "list.txt").write_bytes(content)
    with bounded():
        looked_at(place / "list.txt")


@many(COUNTS["records"])
@given(
    content=st.one_of(
        altered(RECORD).map(as_json),
        damaged(as_json(RECORD)),
        st.binary(max_size=60),
        st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"NaN"]),
    )
)
def test_records(place, content):
    path = place / "record.json"
    path.write_bytes(content)
    with bounded():
        found = read_result(path)
        assert isinstance(found, Result)
        if objection(found) is None:
            comparison_table([found])


def saved(content, path):
    torch.save(content, path)
    return path


@many(COUNTS["keys"])
@given(
    st.dictionaries(
        st.one_of(
            st.sampled_from(
                [
                    *TENSORS,
                    "blocks.99999.attn.qkv.weight",
                    "blocks.x.norm1.weight",
                    "module.cls_token",
                    "teacher",
                    "student",
                    "head.mlp.0.weight",
                    "\x1b[31m",
                    "format",
                    "version",
                    "origin",
                    "network",
                ]
            ),
            st.text(max_size=12),
        ),
        st.one_of(
            st.lists(st.integers(0, 40), max_size=4).map(torch.zeros),
            st.sampled_from(VALUES),
            st.just(torch.zeros(1).expand(40_000, 30_000)),
            st.sampled_from([FORMAT, VERSION, torch.zeros(2, dtype=torch.bool)]),
        ),
        max_size=6,
    ),
    st.booleans(),
)
def test_keys_of_checkpoints(place, content, nested):
    whole = {name: torch.zeros(shape) for name, shape in TENSORS.items()} | content
    path = saved({"teacher": whole} if nested else whole, place / "keys.pth")
    for read in (load_backbone, inspect_model):
        with bounded():
            read(str(path))


def bytes_of_weights():
    path = Path(os.environ["PATCHSSL_CACHE"]) / "fuzzed.pth"
    return saved({name: torch.zeros(shape[:2]) for name, shape in TENSORS.items()}, path).read_bytes()


@many(COUNTS["weights"])
@given(data=st.data())
def test_bytes_of_weights(place, data):
    (place / "bytes.pth").write_bytes(data.draw(damaged(bytes_of_weights())))
    for read in (load_backbone, load_checkpoint):
        with bounded():
            read(place / "bytes.pth" if read is load_checkpoint else str(place / "bytes.pth"))


@many(COUNTS["ground truths"])
@given(
    content=st.one_of(
        *(damaged(pickle.dumps(TRUTH, protocol)) for protocol in (0, 2, 4)),
        altered({**TRUTH, "gnd": [{"bbx": [1, 2, 3, 4], "easy": [0], "hard": [1], "junk": [2]}]}).map(pickle.dumps),
        st.lists(
            st.sampled_from(
                [
                    b"(",
                    b"l",
                    b"d",
                    b"t",
                    b"0",
                    b"2",
                    b"]",
                    b"}",
                    b"a",
                    b"s",
                    b"e",
                    b"u",
                    b"N",
                    b"q\x00",
                    b"h\x00",
                    b"r\xff\xff\xff\x3b",
                    b"\x86",
                    b"\x87",
                    b"\x85",
                    b"I1\n",
                    b"cos\nsystem\n",
                    b"R",
                    b"\x8c\x01a",
                    b"\x81",
                ]
            ),
            max_size=60,
        ).map(lambda steps: b"\x80\x04" + b"".join(steps) + b"."),
    )
)
def test_ground_truths(place, content):
    (place / "gnd_x.pkl").write_bytes(content)
    with bounded():
        read_ground_truth(place / "gnd_x.pkl")


def bytes_of_archive(suffix):
    path = Path(os.environ["PATCHSSL_CACHE"]) / f"fuzzed{suffix}"
    return pack(
        path, {"a/1.png": png(1), "b/2.png": png(2), "b/3.json": b'{"label": 1}', "b/3.png": png(3)}
    ).read_bytes()


@many(COUNTS["archives"])
@given(suffix=st.sampled_from([".zip", ".tar"]), data=st.data())
def test_archives(place, suffix, data):
    path = place / f"set{suffix}"
    path.write_bytes(data.draw(damaged(bytes_of_archive(suffix))))
    with bounded():
        looked_at(path)


@many(COUNTS["environments"])
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "WORLD_SIZE",
                "RANK",
                "LOCAL_RANK",
                "MASTER_ADDR",
                "MASTER_PORT",
                "SLURM_PROCID",
                "SLURM_STEP_NUM_TASKS",
                "PATCHSSL_CACHE_GIB",
                "PATCHSSL_MAX_PIXELS",
            ]
        ),
        st.sampled_from(["", "0", "1", "2", "-1", "x", "1e9", " 3", "9" * 40, "²", "nan", "inf", "1.5"]),
    )
)
def test_environments(place, variables):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed.dist, "init_process_group", lambda backend: None)
        patch.setattr(distributed.dist, "is_initialized", lambda: False)
        patch.setattr(distributed.atexit, "register", lambda function: None)
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        for ask in (distributed.join_launched, distributed.local_rank, default_limit, lambda: looked_at(place / "a")):
            with bounded():
                ask()


FILES = ("run.json", "recipe.yaml", "log.jsonl", "checkpoint.pth")


@pytest.mark.slow
def test_run_folders(tiny_run, tmp_path, patchssl):
    """Every command that takes a run says what is wrong with a damaged one, or takes what is whole of it."""
    count = 0

    @many(COUNTS["run folders"])
    @given(name=st.sampled_from(FILES), data=st.data())
    def tried(name, data):
        nonlocal count
        count += 1
        run = Path(shutil.copytree(tiny_run, tmp_path / f"run{count}"))
        content = (run / name).read_bytes()
        (run / name).write_bytes(
            data.draw(
                st.one_of(damaged(content), altered(json.loads(content)).map(as_json))
                if name == "run.json"
                else damaged(content)
            )
        )
        for read in (read_run, read_run_log, load_checkpoint):
            with bounded():
                read(run)
        seen = ("inspect", run) if name == "checkpoint.pth" else ("plot", "curves", run, "--out", tmp_path / "c.png")
        for words in (seen, ("pretrain", "--resume", run)):
            answer = patchssl(*words)
            assert "should not happen" not in answer.err
            assert answer.code in (0, 1, 2, 3, 4)
        shutil.rmtree(run)

    tried()
    assert count >= COUNTS["run folders"]
