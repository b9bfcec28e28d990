"""YAML as it is read: what PyYAML reads, but for keys that stand twice."""

import json

import pytest
import yaml
from cases import each

from patchssl.eval.records import read_result
from patchssl.models.pretrained import read_config
from patchssl.runtime.errors import CheckpointError, DataError, UsageError
from patchssl.runtime.yamltext import load_json, load_yaml


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


@each("text", ['{"a": 1, "b": {"a": 2}}', "[]", '{"a": [{"b": 1}, {"b": 2}]}', "1.5", '"x"', "{}"])
def test_values_are_those_of_json(text):
    assert load_json(text) == json.loads(text)


@each("text", ['{"a": 1, "a": 1}', '[{"x": {"a": 1, "b": 2, "a": 3}}]', '{"a": 1, "\\u0061": 2}'])
def test_a_key_twice_in_json(text):
    with pytest.raises(ValueError, match="the key 'a' stands twice"):
        load_json(text)


def test_records_and_configs_with_a_key_twice_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224", "architecture": "resnet18"}')
    with pytest.raises(CheckpointError, match=r"cannot be read as JSON: the key 'architecture' stands twice"):
        read_config(tmp_path / "config.json")
    (tmp_path / "knn.json").write_text('{"format": "patchssl result", "schema": 1, "schema": 1}')
    with pytest.raises(DataError, match=r"knn\.json is damaged or not JSON \(the key 'schema' stands twice\)"):
        read_result(tmp_path / "knn.json")
