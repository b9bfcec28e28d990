from collections import Counter
from pathlib import Path

from made_results import report_bench

from patchssl.report.tables.stats import per_query


def test_made_up_records_are_usable_and_always_the_same():
    records = list(report_bench.made_up_records(160))
    assert records == list(report_bench.made_up_records(160))
    assert Counter(record.task for record in records) == {"knn": 64, "linear": 64, "copydays": 8, "roxford5k": 8,
                                                          "rparis6k": 8, "revisited": 8}
    assert all(per_query(record, metric) is not None for record in records for metric in record.metrics)
    assert len({record.path(Path()) for record in records}) == 160


def test_the_bench_makes_all_tables_and_leaves_nothing_out():
    found = report_bench.bench_tables(60)
    assert (found["files"], found["left out"]) == (6, 0)
    assert found["seconds"] > 0 and found["bytes"] > 10_000
