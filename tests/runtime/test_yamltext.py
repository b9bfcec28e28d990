"""YAML as it is read: what PyYAML reads, but for keys that stand twice."""

import json
import tracemalloc

import pytest
import yaml
from cases import each

from patchssl.eval.records import read_result
from patchssl.models.pretrained import read_config
from patchssl.pretrain.recipe import load_recipe, parse_recipe
from patchssl.runtime.errors import CheckpointError, DataError, UsageError
from patchssl.runtime.yamltext import load_json, load_yaml
from patchssl.study.config import parse_study


@each("text", [
    "", "a: 1\nb: {c: [1, 2.5, x], d: null}\n", "- {a: 1}\n- {a: 2}\n", "a: {x: 1}\nb: {x: 1}\n", "1: one\n'1': text\n",
    "base: &b {x: 1, y: 2}\nown: {<<: *b, y: 3}\n", "both: {<<: [{x: 1}, {x: 2}], z: 3}\n", "? [1, 2]\n: pair\n",
])
def test_values_are_those_of_yaml(text):
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:  # a key that is a list
        with pytest.raises(UsageError, match="is not YAML"):
            load_yaml(text, "file")
    else:
        assert load_yaml(text, "file") == expected


@each(("text", "words"), [
    ("optim:\n  epochs: 3\n  lr: 1\n  epochs: 4\n", "'epochs' stands twice, in lines 2 and 4"),
    ("optim: {epochs: 3}\nloss: {}\n\noptim: {lr: 1}\n", "'optim' stands twice, in lines 1 and 4"),
    ("a: {b: {c: 1, c: 1}}\n", "'c' stands twice, in line 1"),
    ("- x: 1\n- x: 1\n  x: 2\n", "'x' stands twice, in lines 2 and 3"),
    ("a: 1\n'a': 2\n", "'a' stands twice, in lines 1 and 2"),
    ("a: {<<: {x: 1}, y: 1, y: 2}", "'y' stands twice"),
])
def test_a_key_that_stands_twice_is_named_with_its_lines(text, words):
    with pytest.raises(UsageError) as caught:
        load_yaml(text, "mine.yaml")
    assert str(caught.value).startswith("mine.yaml: key ")
    assert words in str(caught.value)


@each("text", ["a: [1", "a: b: c", "\tx: 1", "!!python/object:os.system {}"])
def test_what_is_no_yaml_or_no_plain_value_is_a_sentence(text):
    with pytest.raises(UsageError, match=r"^mine\.yaml is not YAML: "):
        load_yaml(text, "mine.yaml")


def aliases(entry, times=9, lines=8):
    """A few lines that stand for times ** lines values: each is a list or table of the one before."""
    return "a0: &a0 {x: 1}\n" + "".join(
        f"a{i}: &a{i} {entry.format(', '.join([f'*a{i - 1}'] * times))}\n" for i in range(1, lines))


@each(("text", "words"), [
    (aliases("[{}]"), "line 4 stands for more than 3,"), (aliases("{{<<: [{}]}}"), "line 4 stands for more than"),
    ("a: &a " + "x" * 1000 + "\nb: [" + ", ".join(["*a"] * 100) + "]", "stands for more than"),
    ("&a [*a]", "32 deep"), ("[" * 40 + "]" * 40, "32 deep"), ("[" * 1100, "32 deep"), ("{" * 1100, "32 deep"),
    ("? " * 1100, "32 deep"), ("- " * 1100, "32 deep"),
    ("a0: &a0 [[[[[1]]]]]\n" + "".join(f"a{i}: &a{i} [[[[[*a{i - 1}]]]]]\n" for i in range(1, 9)), "32 deep"),
    ("a: 2020-13-45", "line 1 has a date"), ("\na: 2020-01-05", "line 2 has a date"), ("a: !!binary xx", "binary data"),
    ("a: !!timestamp x", "a date"), ("a: !!set {b}", "a set"), ("!!omap [a: 1]", "an ordered table"),
    ("!!pairs [a: 1]", "a list of pairs"), ("a: !!int b", "does not fit its tag"), ("a: !!int ''", "not fit its tag"),
    ("a: !!bool b", "does not fit its tag"), ("a: !!float b", "does not fit its tag"), ("a: !!map 1", "is not YAML"),
    ("a: " + "9" * 5000, "a number of 5,000 digits"), ("a: 0x" + "f" * 5000, "5,002 digits"),
    ("a: 1" + ":59" * 5000 + ".5", "15,003 digits"), ("x" * 300_000, "300,000 letters are more than"),
    ("!!python/object/apply:os.system [ls]", "could not determine a constructor"), ("<<: 3", "is not YAML"),
    ("a: [" + "x" * 5000, "is not YAML"), ("x" * 900 + ": 1\n" + "x" * 900 + ": 1", "stands twice"),
    ("!!python/" + "x" * 5000 + " 1", "is not YAML"),
])
def test_few_letters_that_stand_for_much(text, words):
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match=words) as caught:
            load_yaml(text, "mine.yaml")
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith("mine.yaml")
    assert len(str(caught.value)) < 600


@each(("text", "words"), [
    ("x" * 900 + ": 1", "is unknown"), ("optim: {lr: " + "x" * 5000 + "}", "optim.lr = 'xxx"),
    ("optim: {lr: [" + "1, " * 5000 + "]}", r"optim.lr = \[1, 1"), ("optim: {lr: .nan}", "finite"),
    ("optim: {lr: .inf}", "finite"), ("\n".join(f"k{i}: 1" for i in range(20)), "'k0' is unknown.*; and more$"),
])
def test_what_is_wrong_with_a_recipe_is_said_briefly(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        parse_recipe(text)
    assert len(str(caught.value)) < 600
    with pytest.raises(UsageError) as caught:
        parse_study("variants: {a: {}}\n" + text)
    assert len(str(caught.value)) < 800


@each("override", ["optim.lr=2020-13-45", "optim.lr=" + "[" * 1100, "optim.lr=" + "9" * 5000, "x" * 5000, "=" * 5000,
                   "optim.lr=!!python/name:os.system", "optim.lr=.nan", "optim.lr=" + "x" * 5000,
                   "optim.lr={a: 1, a: 1}"])
def test_overrides_of_no_sense_are_sentences(override):
    with pytest.raises(UsageError) as caught:
        parse_recipe("", [override])
    assert len(str(caught.value)) < 600


def test_a_file_that_is_no_recipe_is_not_read(tmp_path):
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UsageError, match="too large"):
        load_recipe(tmp_path / "large.yaml")


@each("text", ['{"a": 1, "b": {"a": 2}}', "[]", '{"a": [{"b": 1}, {"b": 2}]}', "1.5", '"x"', "{}"])
def test_values_are_those_of_json(text):
    assert load_json(text) == json.loads(text)


@each("text", ['{"a": 1, "a": 1}', '[{"x": {"a": 1, "b": 2, "a": 3}}]', '{"a": 1, "\\u0061": 2}'])
def test_a_key_twice_in_json(text):
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        load_json(text)


@each("text", ["[" * 100_000, '{"a":' * 100_000])
def test_deep_json_is_a_sentence(text):
    with pytest.raises(ValueError, match="too deep"):
        load_json(text)


def test_records_and_configs_with_a_key_twice_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "architecture": "resnet18"}')
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON: the key 'architecture' stands twice"):
        read_config(tmp_path / "config.json")
    (tmp_path / "knn.json").write_text('{"format": "patchssl result", "schema": 1, "schema": 1}')
    with pytest.raises(DataError, match=r"knn\.json is damaged or not JSON \(the key 'schema' stands twice\)"):
        read_result(tmp_path / "knn.json")
