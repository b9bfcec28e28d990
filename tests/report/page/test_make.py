"""`patchssl report`: what is damaged or hostile is named and left out, the rest is one page that loads nothing."""

import dataclasses
import json
import os
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from made_results import made_up_records, make_results, report_bench
from PIL import Image

from patchssl.report.page import make as module
from patchssl.report.page.make import make_report
from patchssl.report.tables.cost import CostRecord, Step
from patchssl.runtime.errors import DataError, UsageError

EVIL = "<script>alert('x')</script>"
NETWORK = "random:vit_tiny_patch16_224?img_size=32&patch_size=8&embed_dim=48&depth=1&num_heads=3"


@pytest.fixture
def results(tmp_path):
    """Forty records of two networks, their rankings with galleries of nine images that lie in `tmp_path`/images."""
    return make_results(tmp_path)[0]


class Reader(HTMLParser):
    """What a browser would make of a page: elements with their attributes, and text outside scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self._inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.text += "" if self._inside else data


def page(tmp_path, results, **options):
    made = make_report(tmp_path / "out", results=results, **options)
    return made, Reader(made.path.read_text("utf-8"))


def test_the_page_loads_nothing(tmp_path, results, tiny_run):
    _, read = page(tmp_path, results, runs=[tiny_run], data=[tmp_path / "images"])
    for tag, attributes in read.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form") or attributes.get("rel") == "icon"
        assert not any(name.startswith("on") or name == "style" for name in attributes), attributes
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    policy = next(a["content"] for tag, a in read.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy
    assert policy.count("'sha256-") == 2


def test_headings_are_in_order_and_fields_have_labels(tmp_path, results, tiny_run):
    _, read = page(tmp_path, results, runs=[tiny_run], data=[tmp_path / "images"])
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(attributes.get("alt") for tag, attributes in read.elements if tag == "img")
    assert all(a.get("aria-label") for tag, a in read.elements if tag == "svg" and a.get("role") == "img")
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_everything_there_is_is_in_the_page(tmp_path, results, tiny_run, monkeypatch):
    monkeypatch.setattr("patchssl.report.figures.matches.open_model", None)  # a model is loaded once
    made, read = page(tmp_path, results, runs=[tiny_run], data=[tmp_path / "images"], models=[NETWORK])
    assert (made.num_records, made.num_runs, made.num_pictures, made.problems) == (40, 1, 9, ())
    for words in ("k-NN on frozen features", "All records", "Training", "Worst and best queries", "network-0",
                  "Attention of random", "Matches by the patch tokens of random", "Versions and devices", "resize"):
        assert words in read.text
    drawn = [attributes for tag, attributes in read.elements if tag == "img" and "src" in attributes]
    assert [attributes["src"][:22] for attributes in drawn] == ["data:image/png;base64,"] * 2
    asked = {attributes["data-picture"] for _, attributes in read.elements if "data-picture" in attributes}
    assert asked == {str(i) for i in range(9)}


@pytest.mark.slow
def test_the_same_files_give_the_same_bytes(tmp_path, results, tiny_run):
    options = {"runs": [tiny_run], "data": [tmp_path / "images"], "models": [NETWORK]}
    first = make_report(tmp_path / "a", results=results, **options).path.read_bytes()
    again = shutil.copytree(results, tmp_path / "copy")
    assert make_report(tmp_path / "b", results=again, **options).path.read_bytes() == first


def test_galleries_without_images_say_what_to_do(tmp_path, results):
    made, read = page(tmp_path, results)
    assert made.num_pictures == 0 and made.problems == ()
    assert "give the folders of the data sets as --data" in read.text
    (tmp_path / "images" / "00003.jpg").unlink()
    made, read = page(tmp_path, results, data=[tmp_path / "images"])
    assert made.num_pictures == 8 and "could not be found below the folders" in read.text


def test_a_page_of_too_many_galleries_says_so(tmp_path, results, monkeypatch):
    monkeypatch.setattr(module, "MOST_GALLERIES", 3)
    _, read = page(tmp_path, results)
    assert "The queries of 5 further levels are not shown" in read.text
    assert read.text.count("Worst queries, ") == 3


def hostile(results, tmp_path):
    """Names of files that are written among `results`, each bad in its own way."""
    sound = json.loads(next(results.rglob("knn-*.json")).read_text())
    ranked = json.loads(next(results.rglob("roxford5k-*.json")).read_text())
    galleries = json.loads(json.dumps(ranked))
    galleries["detail"]["galleries"]["medium"][0]["results"][0]["name"] = "../../secret.jpg"
    galleries["weights_sha256"] = "e" * 64
    contents = {
        "empty.json": "", "broken.json": json.dumps(sound)[:-9], "list.json": "[1]", "deep.json": "[" * 10**5,
        "old.json": json.dumps(sound | {"schema": 0}), f"{EVIL.replace('/', '_')}.json": "{",
        "lacks.json": json.dumps({"format": "patchssl result", "schema": 1}),
        "script.json": json.dumps(sound | {"model": EVIL, "weights_sha256": "a" * 64}),
        "up.json": json.dumps(sound | {"dataset": "../../etc", "weights_sha256": "b" * 64}),
        "long.json": json.dumps(sound | {"model": "x" * 10**6, "weights_sha256": "c" * 64}),
        "gallery.json": json.dumps(galleries),
    }
    for name, content in contents.items():
        (results / name).write_text(content)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "secret.jpg")
    return list(contents)


def test_hostile_and_damaged_records_are_named_and_the_rest_is_made(tmp_path, results):
    names = hostile(results, tmp_path)
    (tmp_path / "images" / "00001.jpg").write_text(f"<svg xmlns='http://www.w3.org/2000/svg'>{EVIL}</svg>")
    made, read = page(tmp_path, results, data=[tmp_path / "images"])
    assert made.num_records == 41  # with the one whose gallery alone is left out
    assert made.num_pictures == 8
    assert len(made.problems) == len(names) + 1
    assert all(any(str(results / name) in problem for problem in made.problems) for name in names)
    for reason in ("empty", "broken", "list", "deep", "schema 0", "lacks", "holds HTML", "leads out of its folder",
                   "1,000,000 characters", "leads out of the images' folder", "00001.jpg"):
        assert any(reason in problem for problem in made.problems), reason
    assert [tag for tag, _ in read.elements].count("script") == 2
    assert "alert" in read.text  # shown as text, in the sentences on what was left out
    assert "network-1" in read.text


def test_names_that_are_no_utf8_are_shown_as_escapes(tmp_path, results):
    (results / os.fsdecode(b"caf\xe9.json")).write_text("{")
    made, read = page(tmp_path, results)
    assert made.num_records == 40 and len(made.problems) == 1
    assert r"caf\udce9.json is damaged" in read.text


def test_the_command_says_what_was_left_out_and_exits_with_1(patchssl, tmp_path, results):
    out = tmp_path / "out"
    done = patchssl("report", "--results", results, "--data", tmp_path / "images", "--out", out)
    assert (done.code, done.out.strip()) == (0, str(out / "index.html"))
    (results / "empty\x1b[2J.json").write_text("")
    done = patchssl("report", "--results", results, "--out", out, "--json")
    found = json.loads(done.out)
    assert (done.code, found["records"], len(found["left_out"])) == (1, 40, 1)
    assert "skipped: " in done.err and "empty?[2J.json" in done.err and "\x1b" not in done.err
    assert found["bytes"] == (out / "index.html").stat().st_size


def test_runs_alone_make_a_page(patchssl, tmp_path, tiny_run):
    done = patchssl("report", "--results", tmp_path / "none", "--runs", tiny_run, "--out", tmp_path / "out")
    assert done.code == 0
    text = (tmp_path / "out" / "index.html").read_text()
    assert tiny_run.name in text and 'id="results"' not in text


def test_what_is_not_there_is_said(tmp_path, results):
    with pytest.raises(DataError, match="nothing to report"):
        make_report(tmp_path / "out", results=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--data"):
        make_report(tmp_path / "out", results=results, data=[tmp_path / "nowhere"])
    with pytest.raises(UsageError, match="--runs"):
        make_report(tmp_path / "out", results=results, runs=[tmp_path / "nowhere"])
    with pytest.raises(UsageError):
        make_report(tmp_path / "out", results=results, models=["runs/nowhere"])
    with pytest.raises(DataError, match=r"nowhere\.jpg"):
        make_report(tmp_path / "out", results=results, models=[NETWORK], images=["nowhere.jpg"])
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="could not be written"):
        make_report(tmp_path / "file", results=results)
    assert not (tmp_path / "out").exists()


def test_robustness_has_a_curve_per_row_and_titles_that_differ(tmp_path):
    """Two protocols of one name stand apart; a row's points are its mAPs."""
    base = next(record for record in made_up_records(20) if record.task == "copydays")
    metrics = {"strong/map": 0.5, "jpegqual/3/map": 0.25, "jpegqual/75/map": 0.9, "crops/10/map": 0.8,
               "crops/80/map": 0.3}
    for number, name in enumerate(("one", "two")):
        dataclasses.replace(base, metrics=metrics, detail={}, weights_sha256=str(number) * 64, model=name).write(
            tmp_path / "results")
    dataclasses.replace(base, metrics=metrics, detail={}, protocol_fingerprint="f" * 16, protocol="dino",
                        weights_sha256="9" * 64).write(tmp_path / "results")
    _, read = page(tmp_path, tmp_path / "results")
    labels = [a["aria-label"] for tag, a in read.elements if tag == "svg" and a.get("role") == "img"]
    assert len(labels) == 4
    assert "one, vit-0 from 25 to 90" in labels[0] and "two, vit-0 from 25 to 90" in labels[0]
    assert "one, vit-0 from 80 to 30" in labels[1]
    assert "Bands:" not in read.text  # these records have no detail per query
    assert "copydays, protocol dino #dddddd/111111" in read.text and "#dddddd/ffffff" in read.text


def test_costs_have_a_table_and_hostile_ones_none(tmp_path, results):
    known = {"arch": "vit_tiny", "num_prototypes": 65_536, "images": 2, "views": "2 x 224 px", "threads": 1,
             "clock": "processor", "memory": "resident", "versions": {"torch": "2.14"},
             "steps": [Step(method="dino", way="", seconds=[2.0, 1.0], peak_mib=400.0, floor_mib=100.0)]}
    for device in ("Some CPU", "Some-CPU", EVIL):
        CostRecord(**known, device=device).write(results)
    made, read = page(tmp_path, results)
    assert [problem.partition("left out: ")[2][:21] for problem in made.problems] == ["its device holds HTML"]
    places = [a["id"] for tag, a in read.elements if tag == "table" and a["id"].startswith("cost")]
    assert len(places) == len(set(places)) == 2
    assert {a.get("data-key") for tag, a in read.elements if tag == "td"} >= {"65536.0", "1500.0", "400.0"}


def test_bands_around_curves_are_explained(tmp_path):
    """Two seeds of one method share a curve, whose band is over networks."""
    base = next(record for record in made_up_records(20) if record.task == "copydays")
    for seed in range(2):
        metrics = {"strong/map": 0.5, "jpegqual/3/map": 0.2 + 0.1 * seed, "jpegqual/75/map": 0.9}
        dataclasses.replace(base, method="dino", metrics=metrics, detail={}, seed=seed, weights_sha256=str(seed) * 64,
                            model=f"dino-{seed}").write(tmp_path / "results")
    _, read = page(tmp_path, tmp_path / "results")
    assert "Bands: mean and 95 % t-interval over n networks." in read.text
    assert sum(a.get("class", "").startswith("band") for tag, a in read.elements if tag == "path") == 1


def test_the_bench_makes_a_page_with_every_picture():
    found = report_bench.bench_page(40, 12)
    assert (found["pictures"], found["left out"]) == (12, 0)
    assert found["seconds"] > 0 and found["bytes"] > 100_000


def channel(value):
    value /= 255
    return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4


def contrast(first, second):
    """Of two colors #rrggbb, after WCAG 2.1."""
    light = [sum(weight * channel(int(color[i : i + 2], 16)) for weight, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5)))
             for color in (first, second)]
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_colors_have_the_contrast_that_wcag_asks_for():
    import patchssl.report

    style = (Path(patchssl.report.__file__).parent / "page" / "assets" / "page.css").read_text()
    blocks = re.findall(r"\{([^{}]*--back:[^{}]*)\}", style)
    themes = [dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block)) for block in blocks]
    assert len(themes) == 3 and themes[1] == themes[2] != themes[0]
    for theme in themes:
        for back in ("back", "card"):
            for name in ("text", "soft", "link", "positive", "junk", "error", "distractor"):
                assert contrast(theme[name], theme[back]) >= 4.5, (name, back)
            for name in ("focus", *(f"s{i}" for i in range(8))):
                assert contrast(theme[name], theme[back]) >= 3, (name, back)
        assert contrast(theme["text"], theme["warn"]) >= 4.5


def test_a_file_as_folder_of_the_page_is_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "valid_records", None)
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match=r"could not be written: .*out is a file; name a folder"):
        make_report(tmp_path / "out", results=tmp_path)
    assert (tmp_path / "out").read_text() == "mine"
