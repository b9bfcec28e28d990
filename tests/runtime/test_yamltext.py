"""YAML as it is read: what PyYAML reads, but for keys that stand twice."""

import pytest
import yaml
from cases import each

from patchssl.runtime.errors import UsageError
from patchssl.runtime.yamltext import load_yaml


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
