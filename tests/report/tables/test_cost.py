"""Cost records and the tables made of them: nothing of two machines in one column, ratios within a run only."""

import dataclasses
import json

import pandas as pd
import pytest
from cases import each
from pydantic import ValidationError

from patchssl.eval.records import read_results
from patchssl.report.tables.cost import CostRecord, Step, cost_frames, read_costs, write_costs
from patchssl.report.tables.render import to_markdown


def step(method, way, seconds, peak):
    return Step(method=method, way=way, seconds=seconds, peak_mib=peak, floor_mib=100.0)


def cost(**changes):
    steps = [step("dino", "", [2.0, 1.0, 4.0], 400.0), step("pwself", "16 matches a pair", [3.0, 2.5, 3.5], 500.0),
             step("pwself", "all tokens", [6.0, 6.0, 6.0], 1000.0)]
    return CostRecord(**{"arch": "vit_tiny_patch16_224", "num_prototypes": 65_536, "images": 2, "views": "2 x 224 px",
                         "device": "Some CPU", "threads": 1, "clock": "processor", "memory": "resident", "steps": steps,
                         "versions": {"torch": "2.14"}} | changes)


def test_times_are_medians_with_their_range_and_ratios_are_of_the_same_run():
    frames = cost_frames([cost()])
    assert list(frames) == ["Cost of an update: 2 images (2 x 224 px), Some CPU, 1 thread"]
    (frame,) = frames.values()
    assert frame.to_numpy().tolist() == [
        ["PW-Self, 16 matches a pair", "vit_tiny_patch16_224", "65,536", "3,000 [2,500, 3,500]", "500", "100",
         "0.50", "0.50", "1.50", "1.25"],
        ["PW-Self, all tokens", "vit_tiny_patch16_224", "65,536", "6,000 [6,000, 6,000]", "1,000", "100",
         "1.00", "1.00", "3.00", "2.50"],
        ["DINO", "vit_tiny_patch16_224", "65,536", "2,000 [1,000, 4,000]", "400", "100",
         "0.33", "0.40", "1.00", "1.00"]]
    assert "median of 3 updates" in frame.attrs["notes"][0]


@each("changes", [{"device": "Other CPU"}, {"threads": 2}, {"images": 4}, {"views": "2 x 96 px"},
                  {"clock": "wall"}, {"memory": "device"}, {"versions": {"torch": "2.15"}}])
def test_other_machines_and_settings_have_a_table_of_their_own(changes):
    frames = cost_frames([cost(), cost(**changes)])
    assert [len(frame) for frame in frames.values()] == [3, 3]


def test_every_way_of_a_gpu_has_its_table_whatever_else_differs():
    """Threads of the processor do not stand in the title there, and yet they are part of the setting."""
    gpu = {"device": "Some GPU", "clock": "wall", "memory": "device"}
    frames = cost_frames([cost(**gpu), cost(threads=2, **gpu), cost(**gpu, versions={"torch": "2.15"})])
    assert [len(frame) for frame in frames.values()] == [3, 3, 3]


def test_what_a_run_did_not_measure_is_said():
    (frame,) = cost_frames([cost(steps=[step("ibot", "", [1.0], 300.0)])]).values()
    assert frame.to_numpy().tolist()[0][3:] == ["1,000", "300", "100", *["not run"] * 4]
    (frame,) = cost_frames([]).values()
    assert frame["ms per update"].tolist() == ["not run"] * 3


def test_records_come_back_and_are_not_taken_for_results(tmp_path):
    path = cost().write(tmp_path)
    assert path == tmp_path / "cost" / "vit_tiny_patch16_224-65536-b2@Some_CPU-1.cost.json"
    assert read_costs(tmp_path) == ([cost()], [])
    assert read_results(tmp_path) == ([], [])
    hostile = cost(arch="../../x", device="<b>|\n").write(tmp_path)
    assert hostile.parent == path.parent
    (_, frame), = [item for item in cost_frames(read_costs(tmp_path)[0]).items() if "<b>" in item[0]]
    assert "../../x" in to_markdown(frame)


@each(("spoil", "words"), [
    (lambda facts: facts.update(schema=2), "record schema 2"),
    (lambda facts: facts["steps"][0].update(seconds=[]), "seconds: List should have at least 1 item"),
    (lambda facts: facts["steps"][0].update(seconds=[-1.0]), "greater than 0"),
    (lambda facts: facts.update(format="patchssl result"), "not a cost record"),
    (lambda facts: facts.pop("device"), "device"),
])
def test_a_damaged_record_is_named_and_left_out(tmp_path, spoil, words):
    path = cost().write(tmp_path)
    facts = json.loads(path.read_text())
    spoil(facts)
    path.write_text(json.dumps(facts))
    (problem,) = read_costs(tmp_path)[1]
    assert problem.startswith(f"{path} ") and words in problem


def test_fields_are_checked():
    with pytest.raises(ValidationError, match="num_prototypes"):
        cost(num_prototypes=0)


def test_files_are_the_same_bytes_in_any_order_and_the_numbers_read_back(tmp_path):
    costs = [cost(), cost(num_prototypes=10_000), cost(device="Other")]
    first = [path.read_bytes() for path in write_costs(costs, tmp_path / "a")]
    paths = write_costs(costs[::-1], tmp_path / "b")
    assert [path.read_bytes() for path in paths] == first
    numbers = pd.read_csv(paths[1])
    assert sorted(numbers[numbers.method == "dino"].ms) == [2000.0] * 3
    assert dataclasses.astuple(costs[0]) == dataclasses.astuple(cost())
