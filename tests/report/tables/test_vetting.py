import dataclasses
import json

from cases import each

from patchssl.eval.naming import fault_of, leads_out
from patchssl.eval.records import Result
from patchssl.report.tables.vetting import objection

SOUND = Result(model="vit a < 3 & b", method="other", arch="vit", weights_sha256="a" * 64, task="knn", dataset="set+1m",
               dataset_fingerprint="d" * 64, protocol="native", protocol_version=1,
               protocol_settings={"resize": 32, "scales": [1.0, 0.5], "whitening": None, "vote": "exp(a / b)"},
               protocol_fingerprint="1" * 16, metrics={"top1@20": 0.5}, versions={"torch": "2.1", "faiss": None},
               device="cpu", duration=1.0)


def test_a_sound_record_is_kept():
    assert objection(SOUND) is None


@each(("changes", "reason"), [
    ({"model": "<script>alert(1)</script>"}, "model holds HTML"),
    ({"model": "x<img src=y onerror=z"}, "model holds HTML"),
    ({"arch": "< /b>"}, "arch holds HTML"),
    ({"dataset": "../../etc"}, "dataset is a path that leads out"),
    ({"model": "/etc/passwd"}, "model is a path that leads out"),
    ({"protocol": "a\u202eb"}, "protocol holds characters"),
    ({"pretrain_data": "x" * 100_000}, "pretrain_data has 100,000 characters"),
    ({"device": "cpu\x1b[2J"}, "device holds characters"),
    ({"metrics": {"<b>": 0.5}}, "metric holds HTML"),
    ({"versions": {"torch": "<b>"}}, "version holds HTML"),
    ({"protocol_settings": {"a": {"b": ["<svg/onload=x>"]}}}, "protocol setting holds HTML"),
    ({"protocol_settings": {"a": list(range(5000))}}, "more than 2,000"),
    ({"protocol_settings": {"a": json.loads("[" * 500 + "]" * 500)}}, "nested more than 8 deep"),
])
def test_what_was_made_to_harm_is_named(changes, reason):
    assert reason in (objection(dataclasses.replace(SOUND, **changes)) or "")


@each("name", ["..", "a/../b", "/a", "C:/a", "..\\a", "\\a"])
def test_paths_that_lead_out(name):
    assert leads_out(name)


@each("name", ["a", "a/b.jpg", "a..b/c", "...", "strong/200001.jpg", "k: v"])
def test_paths_that_stay_inside(name):
    assert not leads_out(name) and fault_of(name) is None
