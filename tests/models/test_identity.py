"""What counts as another network: tensors, settings, code and all that it reaches; and what cannot be told."""

import collections
import enum
import functools
import importlib.util
import json
import logging
import re
import subprocess
import sys
import threading
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import each
from torch import nn

from patchssl.export.folder import export_model
from patchssl.models.backbone import Backbone
from patchssl.models.identity import identify
from patchssl.models.identity.libraries import installed_code
from patchssl.models.load import load_backbone


class Color(enum.Enum):
    RED = 1


class Raises:
    def __getattribute__(self, name):
        raise RuntimeError("not to be looked at")


def nested(depth):
    """Lists in lists."""
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


SMALL = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=24&depth=2&num_heads=3"

NET = '''
import functools
import torch
from torch import nn
from patchssl import Backbone
import helper_of_net as helper
from helper_of_net import scaled

SCALE = 1.0
STEPS = {"a": 1, "b": (2, 3)}

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.ones(3, width))
    @property
    def factor(self):
        return 2.0
    def forward(self, x):
        return x.flatten(2).transpose(1, 2) @ self.weight * self.factor

@functools.lru_cache
def kept(x):
    return x + 1

def made(net, shift):
    @torch.no_grad()
    def tokens(images):
        found = scaled(net(images)) * SCALE + STEPS["a"] + kept(1)
        return helper.shifted(found, shift) + sum((lambda x: x + 3)(n) for n in (1, 2))
    return tokens

def make():
    net = Net()
    return Backbone.from_module(net, tokens=made(net, 0.5), patch_size=8, image_size=32, name="mine")
'''
HELPER = '''
ADDED = 7

def inner(x):
    return x * 3

def scaled(x):
    return inner(x)

def shifted(x, by):
    return x + by + ADDED

def not_asked_for(x):
    return x
'''


@pytest.fixture
def net(tmp_path, monkeypatch):
    """What `identify` says of NET and HELPER after replacements in their text."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def identity(old="", new=""):
        assert not old or old in NET + HELPER
        for name, text in (("net_of_test", NET), ("helper_of_net", HELPER)):
            (tmp_path / f"{name}.py").write_text(text.replace(old, new) if old else text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return identify(load_backbone("py:net_of_test:make"))

    yield identity
    for name in ("net_of_test", "helper_of_net"):
        sys.modules.pop(name, None)


@each("old, new", [
    ("SCALE = 1.0", "SCALE = 2.0"),
    ('"b": (2, 3)', '"b": (2, 4)'),
    ("self.factor\n", "self.factor * 2\n"),
    ("return 2.0", "return 2.5"),
    ("return x + 1", "return x + 2"),  # behind lru_cache
    ("x + 3", "x + 4"),  # a lambda in a generator
    ("made(net, 0.5)", "made(net, 0.25)"),  # a closure's value
    ("torch.ones(3, width)", "torch.zeros(3, width)"),
    ("def __init__(self, width=4)", "def __init__(self, width=5)"),
    ("patch_size=8", "patch_size=16"),
    ("image_size=32, name", "image_size=32, std=(1, 1, 1), name"),
    ("return x * 3", "return x * 4"),  # another module's function, reached by a function of it
    ("ADDED = 7", "ADDED = 8"),
    ("return x + by + ADDED", "return x - by + ADDED"),
    ("+ kept(1)", "- kept(1)"),
    ("@torch.no_grad()", "@torch.inference_mode()"),
])
def test_other_code_and_other_values_that_it_reaches_make_another_network(net, old, new):
    before, after = net(), net(old, new)
    assert before.own_code and not before.unknown and not after.unknown
    assert before.sha256 != after.sha256


@each("old, new", [
    ("\nSCALE", "\n# a remark\n\nSCALE"),
    ("return x\n", "return -x\n"),  # a function that nothing asks for
    ('name="mine"', 'name="yours"'),
    ("image_size=32", "image_size=64"),  # the size it is scored at, which the transform says
])
def test_what_moves_no_number_makes_no_other_network(net, old, new):
    assert net().sha256 == net(old, new).sha256


def test_another_process_finds_the_same_identity(net, tmp_path):
    code = "from patchssl.models.identity import *; from patchssl import load_backbone; " \
           "print(identify(load_backbone('py:net_of_test:make')).sha256)"
    found = net().sha256
    for seed in ("1", "2"):
        said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, text=True, capture_output=True, check=True,
                              env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))})
        assert said.stdout.strip() == found


def test_installed_code_counts_by_its_files_and_well_known_packages_by_their_version(tmp_path, monkeypatch):
    folder = tmp_path / "site-packages"
    (folder / "pooling_of_test").mkdir(parents=True)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for text in ("return x.mean(1)", "return x.amax(1)", "return x.mean(1)"):
        (folder / "pooling_of_test" / "__init__.py").write_text("from pooling_of_test.inner import pool\n")
        (folder / "pooling_of_test" / "inner.py").write_text(f"def pool(x):\n    {text}\n")
        for name in ("pooling_of_test", "pooling_of_test.inner"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        installed_code.cache_clear()
        module = importlib.import_module("pooling_of_test")
        found.append(identify(Backbone.from_module(nn.Identity(), tokens=lambda x, f=module.pool: f(x), patch_size=8)))
    assert found[0] == found[2] and found[0].sha256 != found[1].sha256
    assert "torch" in found[0].libraries and not installed_code("torch") and not found[0].unknown


def test_a_module_of_ones_own_may_have_the_name_of_one_of_pythons(tmp_path, monkeypatch):
    found = []
    for text in ("return x.mean(1)", "return x.amax(1)"):
        (tmp_path / "statistics.py").write_text(f"def pool(x):\n    {text}\n")
        spec = importlib.util.spec_from_file_location("statistics", tmp_path / "statistics.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "statistics", module)
        exec(compile((tmp_path / "statistics.py").read_text(), str(tmp_path / "statistics.py"), "exec"), vars(module))
        found.append(identify(Backbone.from_module(nn.Identity(), tokens=lambda x, m=module: m.pool(x), patch_size=8)))
    assert found[0].sha256 != found[1].sha256 and not found[0].unknown


@each("value", [
    {"a": 1}, (1, "b"), frozenset([(1, 2), (3, 4)]), re.compile("a"), Path("a"), collections.OrderedDict(a=1),
    types.SimpleNamespace(a=1), np.float32(3), np.zeros(3), torch.float32, torch.Size([1]), logging.getLogger("x"),
    Color.RED, partial(max, 1), functools.lru_cache(len), np.add, [].append, torch, types, 2 + 3j])
def test_plain_objects_are_told_and_looking_at_them_twice_gives_the_same(value):
    def same():
        return identify(Backbone.from_module(nn.Identity(), tokens=lambda x, v=value: x, patch_size=8))

    other = identify(Backbone.from_module(nn.Identity(), tokens=lambda x, v=None: x, patch_size=8))
    assert same() == same() and not same().unknown and same().sha256 != other.sha256


@each("make", [Raises, lambda: [Raises()], threading.Lock, lambda: list(range(300_000)), lambda: nested(5000),
               lambda: (x for x in "a")])
def test_odd_objects_end_in_a_reason_and_in_no_error(make):
    value = make()
    found = identify(Backbone.from_module(nn.Identity(), tokens=lambda x, v=value: x, patch_size=8))
    assert found.unknown and len(found.unknown) <= 11


def opened(x):
    return x * len(open("weights.txt").read())  # noqa: PTH123


def counted():
    count = 0

    def tokens(x):
        nonlocal count
        count += 1
        return x * count

    return tokens


@each("tokens, says", [
    (lambda: opened, "tokens_of (opened): using open"),
    (counted, "changing 'count', which later calls see"),
    (lambda: torch.jit.script(nn.Linear(2, 2)), "compiled TorchScript"),
    (lambda: partial(torch.rand, generator=torch.Generator()), "a generator of random numbers"),
    (lambda: partial(torch.add, np.random.default_rng(0)), "a generator of random numbers"),
    (lambda: partial(torch.add, sys.stdout.buffer), "an object of _io."),
    (lambda: (lambda x: x * np.load("weights.npy")), "using load"),
    (lambda: (lambda x: x + torch.rand(3)), "using rand"),
    (lambda: (lambda x: eval("x")), "using eval"),
    (lambda: (lambda x: __import__("helper").f(x)), "using __import__"),
])
def test_what_cannot_be_looked_into_is_said(tokens, says):
    found = identify(Backbone.from_module(nn.Identity(), tokens=tokens(), patch_size=8, image_size=32))
    assert found.own_code and says in "; ".join(found.unknown)


def test_a_lambda_is_told_from_another_by_what_it_does():
    one, same, other = (identify(Backbone.from_module(nn.Identity(), tokens=tokens, patch_size=8)) for tokens in (
        eval("lambda x: x.mean(1)"), eval("lambda x: x.mean(1)"), eval("lambda x: x.amax(1)")))
    assert one == same and one.sha256 != other.sha256 and not one.unknown


@each("uri", [SMALL.replace("num_heads=3", "num_heads=6"), SMALL.replace("depth=2", "depth=3"), f"{SMALL}&seed=1"])
def test_networks_of_loaders_differ_by_weights_and_heads(uri):
    first, other = identify(load_backbone(SMALL)), identify(load_backbone(uri))
    assert not first.own_code and first.sha256 != other.sha256
    assert first == identify(load_backbone(SMALL))


def test_a_folder_that_was_exported_is_the_same_network_until_its_configuration_is_changed(tmp_path):
    export_model(SMALL, tmp_path / "out", formats=["timm"])
    config = tmp_path / "out" / "config.json"
    written = json.loads(config.read_text())
    folder = load_backbone(str(tmp_path / "out"))
    assert identify(folder).sha256 == identify(load_backbone(SMALL)).sha256
    found = {identify(folder).sha256}
    for change in ({"model_args": {**written["model_args"], "num_heads": 6}},
                   {"pretrained_cfg": {**written["pretrained_cfg"], "mean": [0.5, 0.5, 0.5]}},
                   {"patchssl": {**written["patchssl"], "positions": "timm"}}):
        config.write_text(json.dumps({**written, **change}))
        changed = load_backbone(str(tmp_path / "out"))
        assert changed.weights_sha256 == folder.weights_sha256
        found.add(identify(changed).sha256)
    assert len(found) == 4


@each("change", [
    lambda net: setattr(net.module.blocks[0], "forward", lambda x: x),
    lambda net: net.module.blocks[0].register_forward_hook(lambda module, given, out: out * 2),
    lambda net: setattr(net, "features", lambda images: images.flatten(1)),
    lambda net: setattr(net.module, "norm", type("OwnNorm", (nn.LayerNorm,), {"__module__": __name__})(24)),
])
def test_a_network_of_a_loader_that_was_changed_by_hand_is_ones_own(change):
    network = load_backbone(SMALL)
    change(network)
    found = identify(network)
    assert found.own_code and found.sha256 != identify(load_backbone(SMALL)).sha256


def test_a_network_that_is_compiled_is_the_network():
    plain = nn.Linear(2, 2)
    wrapped = torch.compile(plain)
    names = [identify(Backbone.from_module(plain, tokens=tokens, patch_size=8)) for tokens in (plain, wrapped)]
    assert not names[0].unknown + names[1].unknown
