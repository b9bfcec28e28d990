"""Curves from Copydays records, and the figure they make."""

import dataclasses
import itertools

import numpy as np
import pytest

from patchssl.eval.records import Result
from patchssl.report.plots import plot_robustness
from patchssl.report.tables.robustness import robustness_curves
from patchssl.runtime.errors import UsageError
from patchssl.sets.copydays import BLOCKS, CROP_PERCENTS, JPEG_QUALITIES

BASE = Result(
    model="net", method="dino", arch="vit_tiny", weights_sha256="a" * 64, pretrain_data="photos", pretrain_epochs=5.0,
    task="copydays", dataset="copies", dataset_fingerprint="d" * 64, protocol="native", protocol_version=1,
    protocol_settings={}, protocol_fingerprint="1" * 16,
    metrics={f"{block}/map": 1 / place for place, block in enumerate(BLOCKS, 1)} | {"overall/muap": 0.5},
    seed=0, versions={}, device="cpu", duration=1.0)
_weights = itertools.count()


def record(**changes):
    return dataclasses.replace(BASE, weights_sha256=f"{next(_weights):064x}", **changes)


def shifted(by):
    return {name: value / 2 + by for name, value in BASE.metrics.items()}


def test_a_curve_holds_every_block_of_copydays_by_its_number():
    [setting] = robustness_curves([record()])
    [curve] = setting.curves
    assert tuple(curve.jpeg) == JPEG_QUALITIES and tuple(curve.crops) == CROP_PERCENTS
    assert curve.jpeg[3].mean == BASE.metrics["jpegqual/3/map"]
    assert curve.crops[80].mean == BASE.metrics["crops/80/map"]
    assert curve.strong.mean == BASE.metrics["strong/map"] and curve.n == 1


def test_networks_that_differ_in_the_seed_share_a_curve_and_other_protocols_another_figure():
    records = [record(seed=0, metrics=shifted(0.1)), record(seed=1, metrics=shifted(0.3)),
               record(method="pwself"), record(protocol_fingerprint="2" * 16), record(dataset="others")]
    settings = robustness_curves(records)
    assert [(s.dataset, s.protocol_fingerprint[0], len(s.curves)) for s in settings] == [
        ("copies", "1", 2), ("copies", "2", 1), ("others", "1", 1)]
    dino, pwself = settings[0].curves
    assert (dino.row.label, dino.n, pwself.n) == ("DINO", 2, 1)
    point = dino.crops[10]
    assert point.mean == pytest.approx(BASE.metrics["crops/10/map"] / 2 + 0.2)
    assert point.high - point.mean == pytest.approx(12.706 * 0.1, rel=1e-4)  # t of one degree of freedom


def test_records_of_other_tasks_and_odd_metrics_are_no_curve():
    assert robustness_curves([record(task="knn")]) == []
    odd = record(metrics={"jpegqual/x/map": 0.1, "crops/10/mp@1": 0.2, "jpegqual/3/map/": 0.3, "original/map": 1.0})
    assert robustness_curves([odd]) == []


def test_the_figure_shows_percent_against_quality_and_area(drawn, tmp_path):
    records = [record(seed=0, metrics=shifted(0.1)), record(seed=1, metrics=shifted(0.3)), record(method="pwself")]
    plot_robustness(robustness_curves(records), tmp_path / "r.png")
    jpeg, crops, strong = drawn[0].axes
    assert [axes.get_xlabel() for axes in drawn[0].axes] == [
        "JPEG quality (lower: harder)", "area cut away (%)", "strong copies"]
    assert jpeg.get_ylabel() == "mAP (%)" and jpeg.get_title(loc="left") == "copies, protocol native"
    curve = jpeg.get_lines()[1].get_xydata()
    expected = [(q, 100 * BASE.metrics[f"jpegqual/{q}/map"]) for q in JPEG_QUALITIES]
    assert curve == pytest.approx(np.array(expected))
    assert crops.get_lines()[0].get_xdata().tolist() == list(CROP_PERCENTS)
    band = crops.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() >= 0 and band[:, 1].max() <= 100  # never beyond what a share can be
    marked = [line.get_ydata().tolist() for line in strong.get_lines() if len(line.get_xdata()) == 1]
    assert marked == [pytest.approx([100 * (BASE.metrics["strong/map"] / 2 + 0.2)]),
                      pytest.approx([100 * BASE.metrics["strong/map"]])]
    legend = drawn[0].legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        "DINO, vit_tiny, photos, 5 epochs; n = 2", "PW-Self, vit_tiny, photos, 5 epochs"]
    assert "95 %" in legend.get_title().get_text()


def test_networks_whose_seeds_are_not_known_to_differ_have_a_curve_each(drawn, tmp_path):
    plot_robustness(robustness_curves([record(seed=None), record(seed=1)]), tmp_path / "r.png")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert len(labels) == 2 and not any("n = 2" in label for label in labels)


def test_the_figure_says_what_its_intervals_are_of(drawn, tmp_path):
    [setting] = robustness_curves([record()])
    strong = dataclasses.replace(setting.curves[0].strong, low=0.4, high=0.6, interval="queries")
    curves = (dataclasses.replace(setting.curves[0], strong=strong),)
    plot_robustness([dataclasses.replace(setting, curves=curves)], tmp_path / "r.png")
    assert drawn[0].legends[0].get_title().get_text() == "95 % t-interval over the queries of single networks"
    assert any(line.get_ydata() == pytest.approx([40, 60]) for line in drawn[0].axes[2].get_lines()
               if len(line.get_ydata()) == 2)


def test_two_settings_that_read_the_same_are_told_apart(drawn, tmp_path):
    plot_robustness(robustness_curves([record(), record(protocol_fingerprint="2" * 16)]), tmp_path / "r.png")
    titles = [axes.get_title(loc="left") for axes in drawn[0].axes[::3]]
    assert titles == [f"copies, protocol native #dddddd/{n * 6}" for n in "12"]


def test_of_many_models_the_strongest_are_drawn_and_the_figure_says_so(drawn, tmp_path):
    records = [record(method="other", model=f"net-{i:02}", metrics={"strong/map": i / 100}) for i in range(20)]
    plot_robustness(robustness_curves(records), tmp_path / "r.png")
    assert drawn[0].axes[0].get_title(loc="left") == "copies, protocol native: 14 of 20 models"
    names = [text.get_text().split(",")[0] for text in drawn[0].legends[0].get_texts()]
    assert names == [f"net-{i:02}" for i in range(6, 20)]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn[0].axes[0].get_lines()}
    assert len(looks) == 14


def test_names_from_records_are_shown_as_they_are_written(tmp_path):
    records = [record(method="other", model=name) for name in
               ("a$\\frac$b", "_hidden", "<script>alert(1)</script>", "two\nlines\x07")]
    text = plot_robustness(robustness_curves(records), tmp_path / "r.svg").read_text("utf-8")
    assert "<script" not in text and "\x07" not in text
    again = plot_robustness(robustness_curves(records), tmp_path / "again.svg").read_text("utf-8")
    assert text == again


def test_nothing_to_draw_is_said(tmp_path):
    with pytest.raises(UsageError, match="eval copydays"):
        plot_robustness([], tmp_path / "r.png")


def test_the_command_names_records_that_it_left_out(patchssl, tmp_path):
    record(model="net-0").write(tmp_path / "results")
    other = record(model="net-1", dataset="others").write(tmp_path / "results")
    out = tmp_path / "r.png"
    ran = patchssl("plot", "robustness", "--results", tmp_path / "results", "--out", out)
    assert (ran.code, ran.out.strip()) == (0, str(out)) and out.read_bytes().startswith(b"\x89PNG")
    other.write_text("{")
    other = other.rename(other.with_name("a\x1b[31mb.json"))
    ran = patchssl("plot", "robustness", "--results", tmp_path / "results", "--out", out)
    assert ran.code == 1 and str(other).replace("\x1b", "?") in ran.err and out.is_file()
    assert "\x1b" not in ran.err
    ran = patchssl("plot", "robustness", "--results", tmp_path / "results", "--set", "others", "--out", out)
    assert ran.code == 2 and "copies (native)" in ran.err
    ran = patchssl("plot", "robustness", "--results", tmp_path / "none", "--out", out)
    assert ran.code == 4 and "eval copydays MODEL" in ran.err
