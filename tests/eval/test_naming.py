"""What eval calls a network and its images, tables take, whatever they are called."""

from pathlib import Path
from tempfile import TemporaryDirectory

from cases import each
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from patchssl.eval.naming import fault_of, leads_out, shown_name
from patchssl.eval.protocols import knn_protocol
from patchssl.eval.records import make_record
from patchssl.models.backbone import Backbone
from patchssl.report.tables.build import comparison_table
from patchssl.report.tables.vetting import valid_records

PIECES = ["<b>", "</", "< script", "..", "/", "\\", ":/", "C:/", "\x1b[31m", "\t", "\n", "\udcff", "a", ".", " ", "é",
          "\u202e", "x" * 300, "@", "&amp;", "%2e%2e/"]
names = st.one_of(st.text(st.characters(exclude_categories=())), st.lists(st.sampled_from(PIECES)).map("".join))


@given(names)
def test_a_name_is_written_so_that_it_is_taken(name):
    shown = shown_name(name)
    assert shown
    assert fault_of(shown) is None
    assert not leads_out(shown)
    assert shown_name(shown) == shown
    if name and fault_of(name) is None and not leads_out(name):
        assert shown == name


@each("name", ["../my<b>run", "tab\there", "/abs/C:/x", "caf\udce9", "x" * 700])
def test_a_record_of_any_name_stands_in_a_table(name):
    backbone = Backbone.from_module(nn.Identity(), patch_size=4, image_size=4, name=name)
    record = make_record(backbone, knn_protocol("native", 4), dataset=name, fingerprints=["ab"], device="cpu",
                         metrics={"top1@20": 0.5, "top5@20": 0.7}, detail={}, duration=1.0)
    with TemporaryDirectory() as folder:
        record.write(Path(folder))
        found, problems = valid_records(Path(folder))
    assert not problems
    assert list(found.values()) == [record]
    assert "50.0" in comparison_table([record]).to_string()
