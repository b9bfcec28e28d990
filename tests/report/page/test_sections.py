import dataclasses

import pandas as pd
from made_results import made_up_records

from patchssl.eval.tasks import table_metrics
from patchssl.report.page.sections import (
    comparison_tables,
    dataset_table,
    environment_table,
    frame_table,
    network_table,
    protocol_cards,
    record_table,
)
from patchssl.report.tables.build import comparison_table

RECORDS = [dataclasses.replace(record, protocol_settings={"resize": 256, "scales": [1.0, 0.5], "whitening": None})
           for record in made_up_records(40)]


def texts(table):
    return [[cell.text for cell in row] for row in table.rows]


def test_a_frame_keeps_its_words_its_bold_cells_and_its_notes():
    frame = pd.DataFrame([["DINO", "vit", "–", "23.9 [22.1, 25.0]"], ["X", "vit", "–", "not run"]],
                         columns=["Method", "Architecture", "Pretraining", "set, %"])
    frame.attrs |= {"bold": [(0, 3)], "notes": ["one"]}
    table = frame_table(frame, "title")
    assert texts(table) == frame.values.tolist() and table.columns == tuple(frame.columns)
    assert [[cell.number for cell in row] for row in table.rows] == [[None, None, None, 23.9], [None] * 4]
    assert [cell.bold for cell in table.rows[0]] == [False, False, False, True]
    assert (table.numeric, table.notes) == ((False, False, False, True), ("one",))


def test_the_tables_are_those_of_patchssl_tables():
    tables = comparison_tables(RECORDS)
    tasks = [task for task in table_metrics() if any(record.task == task for record in RECORDS)]
    assert len(tables) == len(tasks) == 6
    for table, task in zip(tables, tasks, strict=True):
        frame = comparison_table(RECORDS, task)
        assert texts(table) == frame.values.tolist()
        assert list(table.notes) == frame.attrs["notes"]


def test_every_record_has_a_row():
    table = record_table(RECORDS)
    assert len(table.rows) == 40
    place = table.columns.index("%")
    record = min(RECORDS, key=lambda record: (record.model, record.weights_sha256, record.task, record.dataset))
    (value,) = record.metrics.values()
    assert table.rows[0][0].text == record.model
    assert table.rows[0][place] == (f"{100 * value:.1f}", 100 * value, False)


def test_a_record_of_an_unknown_task_shows_one_metric():
    odd = dataclasses.replace(RECORDS[0], task="new", metrics={"b": 0.5, "a": 0.25})
    (row,) = record_table([odd]).rows
    assert [cell.text for cell in row][1:3] == ["25.0", "a"]


def test_provenance_counts_networks_data_sets_and_environments():
    other = dataclasses.replace(RECORDS[0], versions={"torch": "9"}, device="cuda", weights_sha256="b" * 64)
    records = [*RECORDS, other]
    assert len(network_table(records).rows) == 3
    assert sum(row[-1].number for row in dataset_table(records).rows) == 41
    assert texts(environment_table(records)) == [["cpu", "none", "40"], ["cuda", "9", "1"]]


def test_a_protocol_has_one_card_with_every_setting():
    other = dataclasses.replace(RECORDS[0], protocol_fingerprint="2" * 16)
    cards = protocol_cards([*RECORDS, other])
    assert [(card.task, card.name, card.num_records) for card in cards if card.task == "knn"] == [
        ("knn", "dino", 16), ("knn", "dino", 1)]
    assert cards[0].settings == (("resize", "256"), ("scales", "1, 0.5"), ("whitening", "none"))
