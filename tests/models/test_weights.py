"""Files of weights: what is in them, damaged in every way, and hostile ones that are read and never run."""

import argparse
import functools
import gzip
import io
import json
import os
import pickle
import random
import runpy
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from safetensors.torch import save_file

import patchssl
from patchssl.models.checkpoint import load_checkpoint
from patchssl.models.load import load_backbone
from patchssl.models.weights import BARE, read_torch, read_weights, split_head, unwrapped, weights_in
from patchssl.runtime.errors import CheckpointError, UsageError

STATE = {"norm.weight": torch.arange(500.0), "norm.bias": torch.full((500,), 2.0)}


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def written(raw, path):
    path.write_bytes(raw)
    return path


# what is in a file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [False, True])
def test_networks_and_the_rest(tmp_path, old):
    content = {"teacher": STATE, "student": STATE, "epoch": 3, "args": argparse.Namespace(arch="vit_small", lr=0.1),
               "optimizer": {"param_groups": [{"lr": np.float64(0.5), "betas": (np.float32(0.9), np.int64(1))}]},
               "dino_loss": {"center": torch.zeros(1, 4)}, "empty": {}, 5: "five"}
    file = read_weights(saved(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old))
    assert (sorted(file.networks), file.kind, file.epoch) == (["student", "teacher"], "torch", 3)
    assert torch.equal(file.networks["teacher"]["norm.weight"], STATE["norm.weight"])
    assert set(file.rest) == {"epoch", "args", "optimizer", "dino_loss", "empty", 5}
    assert file.args == {"arch": "vit_small", "lr": 0.1}
    group = file.rest["optimizer"]["param_groups"][0]
    assert group == {"lr": 0.5, "betas": (np.float32(0.9), 1)}
    assert type(group["betas"][0]) is np.float32


def test_numbers_of_both_generations_of_numpy(tmp_path):
    """numpy 2 writes numpy._core, numpy 1 wrote numpy.core: the same length, as DINO's checkpoints have it."""
    for name in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        raw = pickle.dumps({"lr": np.float64(0.25)}, protocol=2)
        assert raw.count(b"numpy._core.multiarray") == 1
        file = zip_of(raw.replace(b"numpy._core.multiarray", name), tmp_path / "a.pth")
        assert read_torch(file) == {"lr": 0.25}


@each(("rest", "args", "epoch"), [
    ({}, {}, None), ({"args": {"arch": "x"}, "epoch": 7}, {"arch": "x"}, 7), ({"args": [1], "epoch": "3"}, {}, None),
    ({"args": None, "epoch": -1}, {}, None), ({"epoch": torch.ones(3)}, {}, None),
])
def test_arguments_and_epochs(rest, args, epoch):
    file = weights_in({"teacher": STATE, **rest}, Path("a.pth"))
    assert (file.args, file.epoch) == (args, epoch)


def test_a_bare_network_and_safetensors(tmp_path):
    file = read_weights(saved(STATE, tmp_path / "a.pth"))
    assert (list(file.networks), dict(file.rest), file.choose(None)) == ([BARE], {}, BARE)
    save_file(STATE, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = read_weights(tmp_path / "a.safetensors")
    assert (file.kind, list(file.networks), dict(file.rest)) == ("safetensors", [BARE], {"format": "pt"})
    assert torch.equal(file.networks[BARE]["norm.weight"], STATE["norm.weight"])


def test_a_network_with_torchs_own_notes(tmp_path):
    """What `Module.state_dict` returns: an OrderedDict with an attribute of its own, and parameters for tensors."""
    state = torch.nn.Sequential(torch.nn.BatchNorm2d(3)).state_dict(keep_vars=True)
    assert state._metadata
    found = read_weights(saved(state, tmp_path / "a.pth")).networks[BARE]
    assert sorted(found) == ["0.bias", "0.num_batches_tracked", "0.running_mean", "0.running_var", "0.weight"]


def test_a_tensor_with_attributes_of_its_own(tmp_path):
    """A file can give parameters any attributes, and with them other functions than a tensor's."""
    weight = torch.nn.Parameter(torch.arange(3.0))
    weight.is_floating_point = weight.float = weight.detach = "hostile"
    for content in ({"a.weight": weight}, {"a": {"a.weight": weight}}):
        path = saved(content, tmp_path / "a.pth")
        assert torch.load(path, weights_only=True, map_location="cpu")  # allowed, by torch's lights
        (network,) = read_weights(path).networks.values()
        assert network["a.weight"].is_floating_point()
        assert torch.equal(network["a.weight"].float(), torch.arange(3.0))


@each(("names", "asked", "chosen"), [
    (["student", "teacher"], None, "teacher"), (["student", "teacher"], "student", "student"),
    (["model"], None, "model"), (["model"], "model", "model"),
])
def test_which_network_is_chosen(names, asked, chosen):
    assert weights_in(dict.fromkeys(names, STATE), Path("a.pth")).choose(asked) == chosen


@each(("content", "asked", "words"), [
    ({"student": STATE, "teacher": STATE}, "techer", "a.pth has no 'techer', only student, teacher; choose one"),
    ({"ema": STATE, "model": STATE}, None, "a.pth holds the networks ema, model; choose one as a.pth#NAME"),
    (STATE, "teacher", "a.pth has no 'teacher', one network without a name"),
    ({"model": STATE, "optimizer": {"lr": 1}}, "optimizer", "a.pth has no 'optimizer', only model"),
])
def test_networks_that_are_not_there(content, asked, words):
    file = weights_in(content, Path("a.pth"))
    with pytest.raises(CheckpointError) as caught:
        file.choose(asked)
    assert words in str(caught.value)


@each(("content", "words"), [
    (torch.ones(3), "a.pth holds a single tensor; weights are a table"), ([STATE], "a.pth holds a list"),
    ("text", "holds a str"), (None, "holds a NoneType"), ({}, "holds no network, only nothing"),
    ({"epoch": 3, "dino_loss": {"center": torch.ones(1)}}, "holds no network, only 'dino_loss', 'epoch'"),
    ({"a.weight": torch.ones(1), "b.weight": [1.0]}, "holds no network"), ({"center": torch.ones(1)}, "no network"),
    ({str(number): 0 for number in range(1000)}, "no network, only '0', '1', '10', '100'"),
    ({1: torch.ones(1), "a.weight": torch.ones(1)}, "holds no network"),
    ({1: {"a.weight": torch.ones(1)}}, "holds no network, only 1"),
])
def test_what_is_no_network(tmp_path, content, words):
    with pytest.raises(CheckpointError) as caught:
        read_weights(saved(content, tmp_path / "a.pth"))
    assert words in str(caught.value)


@each("name", ["module.x.weight", "_orig_mod.x.weight", "module._orig_mod.x.weight",
               "_orig_mod.module.x.weight", "x._orig_mod.weight", "module.module.x.weight",
               "_fsdp_wrapped_module.x._fsdp_wrapped_module.weight"])
def test_wrappers_are_taken_off(name):
    assert unwrapped(name) == "x.weight"


def test_names_that_only_look_wrapped():
    assert unwrapped("submodule.x") == "submodule.x"
    assert unwrapped("x.module.y") == "x.module.y"
    assert unwrapped("backbone.module.x") == "backbone.x"


def test_a_backbone_and_its_head():
    names = ("backbone.blocks.0.w", "backbone.norm.w", "head.mlp.0.weight")
    backbone, outside = split_head({f"module.{name}": torch.ones(1) for name in names}, "a.pth")
    assert (sorted(backbone), outside) == (["blocks.0.w", "norm.w"], ["head.mlp.0.weight"])
    assert split_head({"blocks.0.w": torch.ones(1)}, "a.pth")[1] == []


def test_tensors_with_and_without_a_wrapper():
    with pytest.raises(CheckpointError, match=r"a\.pth holds tensors twice, with and without the prefixes module\."):
        split_head({"module.x": torch.ones(1), "x": torch.ones(1)}, "a.pth")


# damage --------------------------------------------------------------------------------------------------------


def is_whole(path):
    found = read_weights(path).networks[BARE]
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@each("format", ["zip", "old", "safetensors"])
def test_a_file_that_ends_early(tmp_path, format):
    """Cut anywhere, it is refused by name; whole, it is read."""
    whole = tmp_path / ("a.safetensors" if format == "safetensors" else "a.pth")
    if format == "safetensors":
        save_file(STATE, whole)
    else:
        saved(STATE, whole, _use_new_zipfile_serialization=format == "zip")
    raw, path = whole.read_bytes(), whole.with_stem("cut")
    assert is_whole(whole)
    for length in sorted({1, 2, 7, 8, 9, 100, *range(200, len(raw), len(raw) // 40), len(raw) - 400, len(raw) - 1}):
        with pytest.raises(CheckpointError) as caught:
            read_weights(written(raw[:length], path))
        assert str(caught.value).startswith(f"{path} ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["zip", "safetensors"])
def test_a_file_that_goes_on_after_its_end(tmp_path, format):
    path = tmp_path / ("a.safetensors" if format == "safetensors" else "a.pth")
    save_file(STATE, path) if format == "safetensors" else saved(STATE, path)
    path.write_bytes(path.read_bytes() + bytes(100_000))
    with pytest.raises(CheckpointError, match=r"truncated, damaged or no"):
        read_weights(path)


def test_any_wrong_byte_is_harmless_or_named(tmp_path):
    """A zip archive has checksums: what is read is what was written, or nothing."""
    raw = saved(STATE, tmp_path / "a.pth").read_bytes()
    weights = raw.index(STATE["norm.bias"].numpy().tobytes())
    draws, path, refused = random.Random(0), tmp_path / "wrong.pth", 0
    ends = range(len(raw) - 150, len(raw))  # where the archive says what is in it
    for position in [*draws.sample(range(len(raw)), 300), *range(weights, weights + 2000, 50), *ends, *ends, *ends]:
        wrong = bytearray(raw)
        wrong[position] ^= 1 << draws.randrange(8)
        try:
            assert is_whole(written(wrong, path))
        except CheckpointError as error:
            assert str(error).startswith(f"{path} ")
            assert "\n" not in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("format", ["old", "safetensors"])
def test_a_wrong_byte_where_nothing_is_checked(tmp_path, format):
    """Formats without checksums cannot tell, but nothing worse happens than wrong numbers or an error of ours."""
    path = tmp_path / ("a.safetensors" if format == "safetensors" else "a.pth")
    if format == "safetensors":
        save_file(STATE, path)
    else:
        saved(STATE, path, _use_new_zipfile_serialization=False)
    raw, draws, refused = path.read_bytes(), random.Random(1), 0
    for position in draws.sample(range(min(len(raw), 1500)), 200):
        wrong = bytearray(raw)
        wrong[position] ^= 1 << draws.randrange(8)
        try:
            read_weights(written(wrong, path))
        except CheckpointError as error:
            assert str(error).startswith(f"{path} ")
            refused += 1
    assert refused > 10


def tensors_header(header, body=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
WRONG = {  # name of the file: (bytes, words of the refusal)
    "empty.pth": (b"", ["is empty (0 bytes)"]),
    "empty.safetensors": (b"", ["is empty (0 bytes)"]),
    "page.pth": (b"\n<!DOCTYPE html>\n<html>", ["is a web page"]),
    "page.safetensors": (b"<html>" * 50, ["is a web page"]),
    "denied.pth": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["is a web page"]),
    "pointer.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", ["git-lfs pointer"]),
    "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", ["git lfs pull"]),
    "packed.pth": (gzip.compress(b"weights"), ["gzip archive"]),
    "packed.7z.pth": (b"7z\xbc\xaf\x27\x1c" + bytes(50), ["7z archive"]),
    "list.pth": (pickle.dumps([1, 2, 3]), ["damaged or no file of weights"]),
    "table.pth": (pickle.dumps({"a.weight": [1.0]}), ["no file of weights"]),
    "text.pth": (b"lr: 0.1\n" * 20, ["no file of weights"]),
    "json.pth": (b'{"message": "Not Found"}', ["no file of weights"]),
    "picture.pth": (b"\x89PNG\r\n\x1a\n" + bytes(100), ["no file of weights"]),
    "zeros.pth": (bytes(5000), ["no file of weights"]),
    "zeros.safetensors": (bytes(5000), ["no safetensors file"]),
    "huge.safetensors": (struct.pack("<Q", 2**63) + b"{}", ["no safetensors file"]),
    "long.safetensors": (struct.pack("<Q", 2**26) + b"{}", ["no safetensors file"]),
    "nothing.safetensors": (struct.pack("<Q", 0), ["no safetensors file"]),
    "deep.safetensors": (tensors_header(b"[" * 50_000), ["no safetensors file"]),
    "no table.safetensors": (tensors_header([1]), ["no safetensors file"]),
    "not utf-8.safetensors": (tensors_header(b'{"\xff": 1}'), ["no safetensors file"]),
    "far.safetensors": (tensors_header({"a": ENTRY | {"data_offsets": [0, 2**40]}}, bytes(8)), ["no safetensors file"]),
    "backwards.safetensors": (tensors_header({"a": ENTRY | {"data_offsets": [8, 0]}}, bytes(8)), ["no safetensors"]),
    "large.safetensors": (tensors_header({"a": ENTRY | {"shape": [2**62, 2**62]}}, bytes(8)), ["no safetensors file"]),
    "negative.safetensors": (tensors_header({"a": ENTRY | {"shape": [-2]}}, bytes(8)), ["no safetensors file"]),
    "overlap.safetensors": (tensors_header({"a": ENTRY, "b": ENTRY}, bytes(8)), ["no safetensors file"]),
    "kind.safetensors": (tensors_header({"a": ENTRY | {"dtype": "OBJ"}}, bytes(8)), ["no safetensors file"]),
}


@each("file", WRONG)
def test_what_is_no_file_of_weights(tmp_path, file):
    raw, words = WRONG[file]
    path = written(raw, tmp_path / file)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(str(path))
    assert str(caught.value).startswith(f"{path} ")
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_length_that_reads_like_a_web_page(tmp_path):
    """A header of 0x3c20 bytes: the file begins with a blank and a less-than sign, and is a good one."""
    path = tmp_path / "a.safetensors"
    names = {f"{number:04d}.weight": torch.ones(1) for number in range(200)}
    save_file(names, path)
    header = json.loads(path.read_bytes()[8:8 + struct.unpack("<Q", path.read_bytes()[:8])[0]])
    body = path.read_bytes()[-4 * len(names):]
    raw = json.dumps(header).encode().ljust(0x3C20)
    written(struct.pack("<Q", len(raw)) + raw + body, path)
    assert path.read_bytes()[:2] == b" <"
    assert read_weights(path).networks[BARE].keys() == names.keys()


def zip_with(parts, path, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in parts.items():
            archive.writestr(name, raw)
    return path


def zip_of(pickled, path):
    """A file as torch writes it, with `pickled` for its content."""
    return zip_with({"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n"}, path)


def parts_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@each("parts", [{}, {"readme.txt": b"hello"}, {"a/data.pkl": pickle.dumps([1])},
                {"../../escaped": b"x", "a/data.pkl": b"\x80\x02}q\x00."}])
def test_an_archive_of_something_else(tmp_path, parts):
    folder = tmp_path / "inner" / "most"
    folder.mkdir(parents=True)
    path = zip_with(parts, folder / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth "):
        load_backbone(str(path))
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["a.pth"]  # and nothing was unpacked


def test_an_archive_that_was_packed_again(tmp_path):
    """Mapped as it lies, a compressed part would be read as if its compressed bytes were weights."""
    parts = parts_of(saved(STATE, tmp_path / "a.pth"))
    assert is_whole(zip_with(parts, tmp_path / "stored.pth"))
    with pytest.raises(CheckpointError, match=r"deflated\.pth is a compressed zip archive"):
        read_weights(zip_with(parts, tmp_path / "deflated.pth", zipfile.ZIP_DEFLATED))


def test_an_archive_whose_parts_are_one(tmp_path):
    """Few bytes that would be read without end: an entry of its list, a thousand times."""
    raw = zip_with({"long": bytes(2**20)}, tmp_path / "a.pth").read_bytes()
    entry = raw[raw.index(b"PK\x01\x02"):-22]  # the list, without the record at its end
    record = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1000, 1000, 1000 * len(entry), len(raw) - 22 - len(entry), 0)
    path = written(raw[:-22] + 999 * entry + record, tmp_path / "b.pth")
    with zipfile.ZipFile(path) as archive:
        assert sum(part.file_size for part in archive.infolist()) == 1000 * 2**20
    with pytest.raises(CheckpointError, match=r"b\.pth is damaged: its parts are larger than the file"):
        read_weights(path)


def test_a_program_of_torchscript_is_no_file_of_weights(tmp_path):
    parts = parts_of(saved(STATE, tmp_path / "a.pth"))
    path = zip_with(parts | {"a/constants.pkl": pickle.dumps(())}, tmp_path / "a.pt")  # by which torch knows one
    with pytest.raises(CheckpointError, match=r"a\.pt .*TorchScript"):
        read_weights(path)


def test_a_tar_archive_is_no_file_of_weights(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"), io.BytesIO())
    with pytest.raises(CheckpointError, match=r"a\.pth "):
        load_backbone(str(tmp_path / "a.pth"))


def test_what_is_no_file_at_all(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "absent", Path(os.devnull)):
        with pytest.raises(UsageError, match=f"{path} is not a file"):
            read_weights(path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = saved(STATE, tmp_path / "a.pth")

    def refuse(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=r"a\.pth cannot be read: Permission denied"):
        read_weights(path)


@each("tensor", [
    torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.bool), torch.zeros(64, dtype=torch.complex64),
    torch.zeros(64).to_sparse(), torch.zeros(64, device="meta"),
], ids=["whole numbers", "truth values", "complex", "sparse", "without content"])
def test_tensors_of_another_kind(tmp_path, tensor):
    backbone = load_backbone("random:vit_tiny_patch16_224?depth=1&embed_dim=64&num_heads=1&img_size=32")
    path = saved(backbone.module.state_dict() | {"norm.weight": tensor}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=rf"a\.pth .*norm\.weight of {tensor.dtype}"):
        load_backbone(str(path))


# hostile files -------------------------------------------------------------------------------------------------


class Calls:
    """Pickled, it makes a careless reader call `function`."""

    def __init__(self, function, *arguments, state=None):
        self.function, self.arguments, self.state = function, arguments, state

    def __reduce__(self):
        return self.function, self.arguments, self.state


def text(word):
    return b"X" + struct.pack("<I", len(word)) + word.encode()


class Frozen(Calls):
    """An attack that can be the key of a table until it is saved."""


def touch(created):
    return Calls(os.system, f"touch {created}")


# objects whose pickles create the file `created` when a careless reader unpickles them
ATTACKS = {
    "os.system": touch,
    "subprocess": lambda created: Calls(subprocess.call, ["touch", str(created)]),
    "eval": lambda created: Calls(eval, f"open({str(created)!r}, 'w').close()"),
    "exec": lambda created: Calls(exec, f"open({str(created)!r}, 'w').close()"),
    "getattr": lambda created: Calls(getattr, touch(created), "x", 0),
    "a method": lambda created: Calls(Path.touch, created),
    "runpy": lambda created: Calls(runpy.run_path, str(program(created))),
    "torch.hub.load": lambda created: Calls(functools.partial(torch.hub.load, source="local"),
                                            str(program(created).parent), "make"),
    "torch.load": lambda created: Calls(functools.partial(torch.load, weights_only=False),
                                        str(saved(touch(created), created.with_name("hostile.pth")))),
    "numpy.memmap": lambda created: Calls(np.memmap, str(created), "uint8", "w+", 0, (10,)),
    "numpy.ndarray.tofile": lambda created: Calls(np.ndarray.tofile, np.ones(3), str(created)),
    "in a Namespace": lambda created: argparse.Namespace(arch="vit_small", deep=[{"x": touch(created)}]),
    "in a list": lambda created: [({"a": [touch(created)]},)],
    "as a key": lambda created: {Frozen(os.system, f"touch {created}"): 1},
    "in an OrderedDict": lambda created: OrderedDict(a=touch(created)),
    "state of a Namespace": lambda created: Calls(argparse.Namespace, state={"x": touch(created)}),
}


def program(created):
    """A script that creates the file `created`, and that torch.hub takes for a repository's."""
    path = created.with_name("hubconf.py")
    path.write_text(f"open({str(created)!r}, 'w').close()\ndef make():\n    return 1\n")
    return path


READERS = {"load_backbone": lambda path: load_backbone(str(path)), "load_checkpoint": load_checkpoint,
           "read_weights": read_weights, "run folder": lambda path: load_backbone(str(path.parent))}


def assert_refused_unrun(path, folder):
    for read in READERS.values():
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert str(path.parent) in str(caught.value)
        assert not (folder / "created").exists()
    return str(caught.value)


@each("old", [False, True], ids=["zip", "old format"])
@each("attack", ATTACKS)
def test_a_file_that_runs_something_is_refused_unrun(tmp_path, attack, old):
    run = tmp_path / "run"
    run.mkdir()
    content = {"format": "patchssl", "version": 1, "teacher": STATE, "args": ATTACKS[attack](tmp_path / "created")}
    path = saved(content, run / "checkpoint.pth", _use_new_zipfile_serialization=not old)
    sentence = assert_refused_unrun(path, tmp_path)
    assert "Nothing of it was executed" in sentence
    torch.load(path, weights_only=False)  # the attack is a real one
    assert (tmp_path / "created").exists()


def old_of(pickled, path):
    """A file as torch wrote it before 1.6, with `pickled` for its content."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True,
                                          "type_sizes": {"short": 2, "int": 4, "long": 4}}]
    return written(b"".join(pickle.dumps(part, 2) for part in head) + pickled + pickle.dumps([], 2), path)


TOUCH = b"cos\nsystem\n"
CRAFTED = {
    "a class of the same name elsewhere": b"\x80\x04\x8c\x07hostile\x8c\x12argparse.Namespace\x93)\x81}" + text("a")
                                          + b"K\x01sb.",
    "a class below the one that is allowed": b"\x80\x04\x8c\x08argparse\x8c\x12Namespace.__init__\x93.",
    "what makes all classes": b"\x80\x04\x8c\x08argparse\x8c\x18Namespace.__subclasses__\x93)R.",
    "a storage that is none": b"\x80\x02(" + text("storage") + TOUCH + text("0") + text("cpu") + b"K\x01tQ.",
    "through an extension code": b"\x80\x02\x82\x01.",
    "an instance of old": b"(" + text("touch") + b"ios\nsystem\n.",
    "the allowed class as an object": b"\x80\x02cargparse\nNamespace\n}" + text("__class__") + b"K\x01sb.",
    "attributes of a tensor's maker": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("x") + b"K\x01sb.",
    "a number of no size": b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("f8") + b"K\x00K\x01\x87R"
                           + text("") + b"\x86R.",
    "an object of numpy": b"\x80\x02cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\n" + text("O8") + b"K\x00K\x01\x87R"
                          + text("12345678") + b"\x86R.",
    "an array of numpy": b"\x80\x02cnumpy._core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text("b")
                         + b"\x87R.",
    "a stand-in by its own name": b"\x80\x02cpatchssl.plainpickle\n_Array\n)R.",
    "a loop": b"\x80\x02]q\x00h\x00a.",
    "an empty stack": b"\x80\x020.",
    "an open end": b"\x80\x02]q\x00",
    "an unknown code": b"\x80\x02\xff.",
    "a memo that is not there": b"\x80\x02h\x07.",
    "a key without end": b"\x80\x02})" + b"\x85" * 5_000 + b"K\x01s.",
    "protocol 5": pickle.dumps({"a": bytearray(b"x")}, 5),
    "nested without end": b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
}


@each("old", [False, True], ids=["zip", "old format"])
@each("attack", CRAFTED)
def test_crafted_pickles_are_refused(tmp_path, monkeypatch, attack, old):
    (tmp_path / "hostile.py").write_text(f"open({str(tmp_path / 'created')!r}, 'w').close()\nclass argparse:\n"
                                         "    class Namespace:\n        pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    assert_refused_unrun((old_of if old else zip_of)(CRAFTED[attack], run / "checkpoint.pth"), tmp_path)
    assert "hostile" not in sys.modules
    assert vars(argparse.Namespace()) == {}  # and nothing stays behind


def nested(times, deeper):
    value = 1
    for _ in range(times):
        value = deeper(value)
    return value


def zeros(*shape):
    return torch.zeros(1).expand(shape)


SHARED = torch.zeros(2**22)
LARGE = {
    "strides of 0": ({"a.weight": zeros(2**20, 2**20)}, "tensor 'a.weight' .* needs 4,398,046,511,104 bytes and has 4"),
    "overlap": ({"a.weight": torch.zeros(2**10).as_strided((1000, 1000), (0, 1))}, "needs 4,000,000 bytes and has 4,0"),
    "in the rest": ({"teacher": STATE, "optimizer": {"state": [(zeros(2**30),)]}}, "has 4, used repeatedly"),
    "in a command line": ({"teacher": STATE, "args": argparse.Namespace(x=zeros(2**30))}, "has 4, used repeatedly"),
    "one storage of many": ({f"{i}.weight": SHARED[i:] for i in range(20)}, "its tensors have more than"),
    "deep": ({"teacher": STATE, "rest": nested(100, lambda part: {"a": part})}, "32 deep"),
    "deep tuples": ({"teacher": STATE, "rest": nested(60, lambda part: (part, part))}, "repeats what it holds"),
}


@pytest.mark.parametrize("old", [False, True])
@each("case", LARGE)
def test_few_bytes_that_stand_for_much_are_refused_at_once(tmp_path, case, old):
    content, words = LARGE[case]
    path = saved(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_weights(path)
    assert len(str(caught.value)) < 500


def test_a_key_whose_hash_takes_minutes(tmp_path):
    for path in (zip_of(b"\x80\x02}N" + b"2\x86" * 60 + b"Ns.", tmp_path / "a.pth"),
                 zip_of(b"\x80\x02Nr\xff\xff\xff\x3f.", tmp_path / "b.pth")):
        with pytest.raises(CheckpointError, match="damaged or no file of weights"):
            read_torch(path)


def test_tied_weights_and_networks_that_share_all_are_read(tmp_path):
    part = torch.zeros(100, 4)
    state = {"a.weight": part, "b.weight": part, "c.weight": part.T, "norm.weight": part[3]}
    file = read_weights(saved({"teacher": state, "student": state, "x": [(state,) * 5] * 5}, tmp_path / "a.pth"))
    assert sorted(file.networks) == ["student", "teacher"]


def test_what_a_command_line_says_is_only_text(tmp_path):
    """Attributes that look like Python's own stay entries of a table."""
    args = argparse.Namespace(arch=["vit_small"])
    vars(args).update({"__class__": "x", "__dict__": 3, "__setstate__": "y", "items": None})
    found = read_weights(saved({"teacher": STATE, "args": args}, tmp_path / "a.pth")).args
    assert found == {"arch": ["vit_small"], "__class__": "x", "__dict__": 3, "__setstate__": "y", "items": None}


# memory --------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch, timm, safetensors
from patchssl.models.load import load_backbone

def anonymous():  # bytes that are this process's own, not a map of a file
    with open("/proc/self/smaps_rollup") as report:
        return next(1024 * int(line.split()[1]) for line in report if line.startswith("Anonymous:"))

load_backbone("random:test_vit")  # imports and caches
for path in sys.argv[1:]:
    before = anonymous()
    backbone = load_backbone(path)
    print(anonymous() - before, sum(p.sum().item() != 0 for p in backbone.parameters()))
"""


@pytest.mark.slow
def test_a_large_checkpoint_stays_in_its_file(tmp_path):
    """Student, teacher and optimizer of 50 MB each; the backbone that is loaded takes a fraction of one."""
    backbone = load_backbone("random:vit_small_patch16_224?depth=7").module.state_dict()
    size = sum(tensor.nbytes for tensor in backbone.values())
    assert size > 48e6
    copies = [{f"backbone.{name}": tensor + copy for name, tensor in backbone.items()} for copy in range(4)]
    path = saved({"student": copies[0], "teacher": copies[1], "optimizer": {"state": {0: copies[2], 1: copies[3]}}},
                 tmp_path / "checkpoint.pth")
    save_file({name: tensor + 1 for name, tensor in backbone.items()}, tmp_path / "a.safetensors")
    assert path.stat().st_size > 4 * size
    environment = os.environ | {"PYTHONPATH": str(Path(patchssl.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", MEASURE, path, tmp_path / "a.safetensors"], env=environment,
                          check=True, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        grown, alive = map(int, line.split())
        assert alive == len(backbone)
        assert grown < size / 5, f"{grown / 1e6:.0f} MB of memory for a backbone of {size / 1e6:.0f} MB"
    assert len(done.stdout.splitlines()) == 2


def test_a_safetensors_file_is_known_by_its_content(tmp_path):
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "weights.pth")
    found = read_weights(tmp_path / "weights.pth")
    assert (found.kind, list(found.networks[BARE])) == ("safetensors", ["norm.weight"])


@each("suffix", ["pth", "safetensors"])
@each("wrapper", ["", "module."])
def test_student_and_teacher_in_one_table_are_two_networks(tmp_path, suffix, wrapper):
    tensors = {f"{wrapper}{network}.backbone.norm.weight": torch.full((3,), float(number))
               for number, network in enumerate(("student", "teacher"))}
    path = tmp_path / f"both.{suffix}"
    save_file(tensors, path) if suffix == "safetensors" else torch.save({"model": tensors}, path)
    found = read_weights(path)
    assert {name: {key: value[0].item() for key, value in part.items()} for name, part in found.networks.items()} == {
        "student": {"backbone.norm.weight": 0.0}, "teacher": {"backbone.norm.weight": 1.0}}
    assert found.choose(None) == "teacher"


def test_nobody_is_told_to_switch_the_protection_off(tmp_path):
    path = tmp_path / "plain.pth"
    path.write_bytes(pickle.dumps({"a": print}))
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert "weights_only" not in str(caught.value) and "Nothing of it was executed" in str(caught.value)
