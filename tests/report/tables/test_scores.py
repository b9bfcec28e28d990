import dataclasses
import math
import random

import numpy as np
import pytest
from cases import each

from patchssl.eval.metrics import wilson_interval
from patchssl.eval.records import Result
from patchssl.report.tables.scores import collect_scores, row_of
from patchssl.report.tables.stats import t_interval
from patchssl.runtime.errors import UsageError

BASE = Result(
    model="run-0",
    method="pwself",
    arch="vit_tiny",
    weights_sha256="a" * 64,
    pretrain_data="textures",
    pretrain_epochs=20.0,
    task="knn",
    dataset="textures",
    dataset_fingerprint="d" * 64,
    protocol="native",
    protocol_version=1,
    protocol_settings={"resize": 32},
    protocol_fingerprint="1" * 16,
    metrics={"top1@20": 0.3},
    detail={"num_test": 1500},
    seed=0,
    versions={},
    device="cpu",
    duration=1.0,
)


def record(**changes: object) -> Result:
    return dataclasses.replace(BASE, **changes)


def seeds(*accuracies: float, **changes: object) -> list[Result]:
    return [
        record(
            seed=seed,
            weights_sha256=f"{seed:064x}",
            model=f"run-{seed}",
            metrics={"top1@20": share},
            **changes,
        )
        for seed, share in enumerate(accuracies)
    ]


def test_variants_of_a_method_have_rows_of_their_own():
    labels = {variant: row_of(record(variant=variant)).label for variant in (None, "pwself", "pwself-rule-paper", "x")}
    assert labels == {None: "PW-Self", "pwself": "PW-Self", "pwself-rule-paper": "PW-Self (rule-paper)",
                      "x": "PW-Self (x)"}
    assert row_of(record(variant="mine-a", method="other")).label == "mine-a"


def test_t_interval_uses_the_tabulated_quantile():
    # 4.303 and 2.776: 97.5 % quantiles for 2 and 4 degrees of freedom in any printed table
    low, high = t_interval([0.2, 0.3, 0.4])
    assert (high - low) / 2 == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    low, high = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (low + high) / 2 == pytest.approx(3.0)
    assert (high - low) / 2 == pytest.approx(2.776 * math.sqrt(2.5) / math.sqrt(5), rel=1e-3)


def test_t_interval_needs_two_values():
    with pytest.raises(ValueError, match="at least two"):
        t_interval([0.3])


def test_seeds_are_averaged_with_a_t_interval():
    (score,) = collect_scores(seeds(0.2, 0.3, 0.4), "knn")
    assert (score.n, score.interval, score.alone) == (3, "seeds", False)
    assert score.mean == pytest.approx(0.3)
    assert (score.low, score.high) == pytest.approx(t_interval([0.2, 0.3, 0.4]))


def test_one_record_gets_the_interval_of_its_test_images():
    (score,) = collect_scores([BASE], "knn")
    assert score.interval == "images"
    assert (score.low, score.high) == pytest.approx(wilson_interval(450, 1500))


def test_one_record_of_queries_gets_the_t_interval_over_them():
    detail = {"aps": {"strong": [0.1, 0.2, None, 0.3]}}  # mean 0.2, deviation 0.1, t of 2 degrees 4.3027
    (score,) = collect_scores([record(task="copydays", metrics={"strong/map": 0.2}, detail=detail)], "copydays")
    assert score.interval == "queries"
    assert (score.low, score.high) == (0.0, pytest.approx(0.2 + 4.3027 * 0.1 / 3**0.5, abs=1e-5))


def test_no_interval_without_a_count_of_test_images_or_for_a_mean_of_precisions():
    (score,) = collect_scores([record(detail={})], "knn")
    assert (score.low, score.high, score.interval) == (None, None, "")
    (score,) = collect_scores([record(task="copydays", metrics={"strong/map": 0.8})], "copydays")
    assert (score.mean, score.low, score.interval) == (0.8, None, "")


def test_the_same_weights_scored_twice_count_once():
    twice = [
        record(model="a"),
        record(model="b"),
        record(weights_sha256="b" * 64, seed=1, metrics={"top1@20": 0.5}),
    ]
    (score,) = collect_scores(twice, "knn")
    assert score.n == 2
    assert score.mean == pytest.approx(0.4)


@pytest.mark.parametrize("seed", [0, None])
def test_records_that_do_not_differ_in_their_seed_are_not_averaged(seed):
    shared = [record(seed=seed, weights_sha256=digit * 64) for digit in "ab"]
    found = collect_scores(shared, "knn")
    assert [(score.n, score.interval, score.alone) for score in found] == [(1, "images", True)] * 2
    known = [record(seed=number, weights_sha256=digit * 64) for number, digit in ((3, "c"), (4, "d"))]
    assert sorted(score.n for score in collect_scores([*shared, *known], "knn")) == [1, 1, 2]
    twice = [shared[0], dataclasses.replace(shared[0], model="again")]
    assert [score.n for score in collect_scores(twice, "knn")] == [1]


def test_networks_of_the_same_weights_are_several_and_older_records_of_one_count_once():
    def of(sha: str | None, **changes: object) -> Result:
        about = {} if sha is None else {"network": {"sha256": sha * 64}}
        return record(detail={**BASE.detail, **about}, **changes)

    two = collect_scores([of("e", model="x?heads=3"), of("f", model="x?heads=6")], "knn")
    assert [score.n for score in two] == [1, 1]
    (one,) = collect_scores([of(None), of("e")], "knn")
    assert one.n == 1 and one.records[0].network.sha256 == "e" * 64


@each("classes, value, detail, shown", [
    (5, 1.0, {}, False), (6, 1.0, {}, True), (5, 0.9, {}, True), (5, 1.0, {"network": {"sha256": "e" * 64}}, True)])
def test_top5_of_an_older_record_with_five_classes_is_not_shown(classes, value, detail, shown):
    accuracy = {str(number): 0.3 for number in range(classes)}
    old = record(metrics={"top1@20": 0.3, "top5@20": value}, detail={"class_accuracy": accuracy, **detail})
    assert ("top5@20" in {score.column.metric for score in collect_scores([old], "knn")}) == shown


@each(
    "changes",
    [
        {"dataset_fingerprint": "e" * 64},
        {"protocol_fingerprint": "2" * 16},
        {"dataset": "cifar10"},
        {"protocol": "dino"},
    ],
)
def test_numbers_that_cannot_be_compared_never_share_a_column(changes):
    scores = collect_scores([BASE, record(weights_sha256="b" * 64, seed=1, **changes)], "knn")
    assert len({score.column for score in scores}) == 2
    assert [score.n for score in scores] == [1, 1]


@each(
    "changes",
    [
        {"method": "dino"},
        {"arch": "vit_small"},
        {"pretrain_data": "cifar10"},
        {"pretrain_epochs": 30.0},
        {"method": "other", "model": "mine"},
    ],
)
def test_different_things_never_share_a_row(changes):
    assert row_of(BASE) != row_of(record(**changes))


def test_rows_come_in_the_fixed_order():
    methods = ["other", "supervised", "ibot", "pwself", "dino", "random", "pixels"]
    scores = collect_scores(
        [record(method=m, weights_sha256=f"{i:064x}") for i, m in enumerate(methods)], "knn"
    )
    labels = [score.row.label for score in scores]
    assert labels == ["Raw pixels", "Random network", "DINO", "PW-Self", "iBOT", "Supervised", "run-0"]


def test_pretraining_is_said_in_words():
    assert row_of(record(method="random")).pretraining == "untrained"
    assert row_of(record(pretrain_epochs=12.5)).pretraining == "textures, 12.5 epochs"
    assert row_of(record(pretrain_epochs=None)).pretraining == "textures, epochs not stated"
    assert row_of(record(pretrain_data=None)).pretraining == "not stated"


def test_only_the_task_asked_for_and_its_headline_metrics_count():
    records = [record(metrics={"top1@20": 0.3, "top1@10": 0.9}), record(task="linear", metrics={"top1": 0.8})]
    (score,) = collect_scores(records, "knn")
    assert (score.column.metric, score.mean) == ("top1@20", 0.3)
    with pytest.raises(UsageError, match="did you mean 'knn'"):
        collect_scores(records, "kn")


def test_the_order_of_the_records_changes_nothing():
    records = seeds(0.21, 0.2345, 0.26, 0.1) + seeds(0.3, 0.1, 0.7, method="dino") + [record(method="pixels")]
    expected = collect_scores(records, "knn")
    shuffler = random.Random(0)
    for _ in range(5):
        shuffler.shuffle(records)
        assert collect_scores(records, "knn") == expected


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.3, 0.02, (2000, 3))
    covered = [low <= 0.3 <= high for low, high in map(t_interval, draws.tolist())]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def few_shot_record(**changes: object) -> Result:
    metrics = {"top1@20": 0.3, "top1@10": 0.9, **{f"fewshot{shots}/top1@20": shots / 100 for shots in (10, 1, 5)}}
    detail = {"num_test": 1500, "fewshot": {
        "fewshot1/top1@20": {"values": [0.0, 0.02], "deviation": 0.0141, "draws": 2},
        "fewshot5/top1@20": {"values": [0.05], "deviation": None, "draws": 1}}}
    return record(**{"protocol": "native-fewshot", "metrics": metrics, "detail": detail, **changes})


def test_every_number_of_shots_is_shown_with_the_deviation_over_its_draws():
    scores = collect_scores([few_shot_record()], "knn")
    assert [score.column.metric for score in scores] == [
        "top1@20", "fewshot1/top1@20", "fewshot5/top1@20", "fewshot10/top1@20"]
    one, five, ten = scores[1:]
    assert (one.low, one.high) == pytest.approx((0.01 - 0.0141, 0.01 + 0.0141))
    assert (one.interval, one.draws) == ("draws", 2)
    # one draw has no deviation, and images do not stand for draws
    assert {(score.low, score.high, score.interval) for score in (five, ten)} == {(None, None, "")}


def test_few_shots_of_several_seeds_get_the_interval_of_their_seeds():
    scores = collect_scores([few_shot_record(seed=seed, weights_sha256=f"{seed:064x}",
                                             metrics={"fewshot5/top1@20": share})
                             for seed, share in enumerate((0.2, 0.3, 0.4))], "knn")
    (score,) = scores
    assert (score.n, score.interval) == (3, "seeds")
    assert (score.low, score.high) == pytest.approx(t_interval([0.2, 0.3, 0.4]))


@each("metric", ["fewshot0/top1@20", "fewshot/top1@20", "fewshot5/top5@20", "fewshot" + "9" * 5000
                 + "/top1@20", "5shot/top1@20"])
def test_what_is_no_few_shot_metric_is_not_shown(metric):
    assert collect_scores([record(metrics={metric: 0.5})], "knn") == []
    assert collect_scores([record(task="linear", metrics={"fewshot5/top1@20": 0.5})], "linear") == []


@each("few", [None, [], {"fewshot1/top1@20": 3}, {"fewshot1/top1@20": {"deviation": "wide"}},
              {"fewshot1/top1@20": {"deviation": -1.0, "draws": 2}}])
def test_few_shots_without_a_usable_deviation_have_none(few):
    (score,) = collect_scores([record(metrics={"fewshot1/top1@20": 0.5}, detail={"fewshot": few})], "knn")
    assert (score.mean, score.low, score.interval) == (0.5, None, "")
