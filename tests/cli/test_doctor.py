import importlib
import json
import os
import socket
from importlib import metadata
from types import SimpleNamespace

import pytest
from cases import each

from patchssl.cli.doctor import Requirement, cache_folders, diagnose, parse_requirement
from patchssl.runtime.findings import Finding, as_json, as_text

doctor = importlib.import_module("patchssl.cli.doctor")  # the package's `doctor` is the command

REQUIRES = [
    "torch>=2.6",
    "made-up-package>=3",
    "numpy>=999",
    "pillow; sys_platform == 'no-such-system'",
    "made-up-tool>=1.5; extra == 'bench'",
    "pytest; extra == 'test'",
]


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.fixture
def installed(monkeypatch):
    """The package as if it were installed with `REQUIRES`."""
    version = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(metadata, "version", lambda name: "0.1.0" if name == "patchssl" else version(name))


def without(monkeypatch, *missing: str, error: Exception | None = None) -> None:
    """Make the import of some modules fail."""
    load = importlib.import_module

    def refuse(name, *args):
        if name in missing:
            raise error or ModuleNotFoundError(f"No module named '{name}'")
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)


def test_this_installation_is_examined_without_a_network(monkeypatch):
    def no_network(*args, **kwargs):
        raise AssertionError("the doctor asked the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    found = by_name(diagnose())
    assert found["torch"].value == metadata.version("torch")
    for name in (
        "python",
        "patchssl",
        "torchvision",
        "timm",
        "torch build",
        "processors",
        "k-NN search",
        "memory",
        "disk",
        "Hugging Face cache",
        "matplotlib cache",
        "HF_HUB_OFFLINE",
    ):
        assert found[name].value


def test_missing_and_outdated_packages_are_problems_with_the_command_that_helps(installed):
    found = by_name(diagnose())
    assert found["torch"].verdict == "ok"
    assert found["made-up-package"] == Finding(
        "made-up-package", "not installed", "problem", "pip install 'made-up-package>=3'"
    )
    assert found["numpy"].verdict == "problem"
    assert ">=999 is needed" in found["numpy"].value
    assert "pillow" not in found


def test_extras_are_optional_and_named_with_what_they_lack(installed):
    found = by_name(diagnose())
    assert found["extra bench"].verdict == "note"
    assert "made-up-tool" in found["extra bench"].value
    assert "patchssl[bench]" in found["extra bench"].advice
    assert found["extra test"] == Finding("extra test", "installed")


def test_a_package_that_is_not_installed_is_no_traceback(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    monkeypatch.setattr(metadata, "version", absent)
    found = by_name(diagnose())
    assert found["patchssl"].verdict == "note"
    assert "pip install ." in found["patchssl"].advice
    assert found["timm"].value == "not installed"


def test_without_faiss_the_search_is_by_torch_and_said_so(monkeypatch):
    without(monkeypatch, "faiss")
    finding = by_name(diagnose())["k-NN search"]
    assert finding.verdict == "note"
    assert finding.value.startswith("torch")
    assert "faiss-cpu" in finding.advice


def test_two_faiss_packages_are_a_problem(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    assert by_name(diagnose())["FAISS packages"].verdict == "problem"


@pytest.mark.parametrize(
    "error", [OSError("libcudart.so.13: cannot open shared object file\nmore"), RuntimeError()]
)
def test_a_broken_torch_hides_no_other_finding(monkeypatch, error):
    without(monkeypatch, "torch", "patchssl.eval.search", error=error)
    found = by_name(diagnose())
    assert found["torch build"].verdict == "problem"
    assert "\n" not in found["torch build"].value
    assert found["k-NN search"].verdict == "problem"
    assert found["disk"].value


def test_a_torchvision_that_does_not_fit_torch_is_a_problem(monkeypatch):
    without(monkeypatch, "torchvision", error=RuntimeError("operator torchvision::nms does not exist"))
    finding = by_name(diagnose())["torchvision build"]
    assert finding.verdict == "problem"
    assert "nms" in finding.value


def fake_torch(*gpus: SimpleNamespace, cuda: str | None = "13.0", hip: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda, hip=hip),
        get_num_threads=lambda: 4,
        cuda=SimpleNamespace(
            is_available=lambda: bool(gpus),
            device_count=lambda: len(gpus),
            get_device_properties=lambda index: gpus[index],
        ),
    )


def gpu(name: str, gibibytes: int, major: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, total_memory=gibibytes * 2**30, major=major)


def test_gpus_are_listed_with_memory_and_bfloat16():
    torch = fake_torch(gpu("NVIDIA H100", 80, 9), gpu("Tesla T4", 16, 7))
    first, second = doctor._examine_gpus(torch)
    assert first == Finding("GPU cuda:0", "NVIDIA H100, 80 GiB, bfloat16")
    assert (second.verdict, second.value) == ("note", "Tesla T4, 16 GiB, no bfloat16")
    assert "precision=fp32" in second.advice


@pytest.mark.parametrize(("driver", "verdict"), [("/usr/bin/nvidia-smi", "note"), (None, "ok")])
def test_a_driver_without_a_usable_gpu_is_worth_a_note(monkeypatch, driver, verdict):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: driver)
    (finding,) = doctor._examine_gpus(fake_torch())
    assert finding.verdict == verdict


def test_cache_folders_follow_the_libraries_variables(tmp_path):
    def paths(**variables: str) -> list[str]:
        return [str(path) for _, path, _ in cache_folders(variables)]

    assert paths(HOME="/home/me") == [
        "/home/me/.cache/huggingface/hub",
        "/home/me/.cache/torch/hub",
        "/home/me/.cache/matplotlib",
    ]
    assert paths(HOME="/home/me", XDG_CACHE_HOME="/cache")[0] == "/cache/huggingface/hub"
    assert paths(HF_HOME="/hf", TORCH_HOME="/t", MPLCONFIGDIR="/m") == ["/hf/hub", "/t/hub", "/m"]
    assert paths(HF_HOME="/hf", HF_HUB_CACHE="/hub")[0] == "/hub"


def test_cache_paths_are_those_of_the_libraries_themselves():
    import huggingface_hub.constants
    import torch

    found = by_name(diagnose())
    assert found["Hugging Face cache"].value.startswith(str(huggingface_hub.constants.HF_HUB_CACHE))
    assert found["torch hub cache"].value.startswith(torch.hub.get_dir())


def test_a_folder_that_cannot_be_written_comes_with_advice(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    found = by_name(
        diagnose({"HOME": str(tmp_path), "MPLCONFIGDIR": str(blocked / "mpl"), "HF_HOME": str(tmp_path)})
    )
    assert found["matplotlib cache"].verdict == "note"
    assert "MPLCONFIGDIR" in found["matplotlib cache"].advice
    assert found["Hugging Face cache"].verdict == "ok"
    assert "not there yet" in found["Hugging Face cache"].value


@each(
    ("value", "says"), [("1", "set:"), ("true", "set:"), ("0", "not set"), ("", "not set")]
)
def test_offline_mode_is_read_as_the_hub_reads_it(value, says):
    assert by_name(diagnose({**os.environ, "HF_HUB_OFFLINE": value}))["HF_HUB_OFFLINE"].value.startswith(says)


@each(
    ("line", "expected"),
    [
        ("torch>=2.6", Requirement("torch", ">=2.6")),
        ("pyyaml", Requirement("pyyaml", "")),
        ("lightly>=1.5; extra == 'bench'", Requirement("lightly", ">=1.5", "bench")),
        ('onnx; extra == "onnx" and python_version >= "3"', Requirement("onnx", "", "onnx")),
        ("faiss-gpu>=1.14; sys_platform == 'no-such-system'", None),
        ("onnx; extra == 'onnx' and sys_platform == 'no-such-system'", None),
    ],
)
def test_requirements_of_the_metadata(line, expected):
    assert parse_requirement(line) == expected


def test_the_text_aligns_marks_and_counts():
    text = as_text(
        [Finding("a", "fine"), Finding("bcd", "broken", "problem", "mend it"), Finding("e", "so so", "note")]
    )
    assert text.splitlines() == [
        "  a    fine",
        "! bcd  broken",
        "       -> mend it",
        "- e    so so",
        "",
        "1 problem, marked with !",
    ]
    assert as_text([Finding("a", "fine")]).endswith("no problems")


def test_json_holds_every_field():
    findings = [Finding("a", "é", "note", "do")]
    assert json.loads(as_json(findings)) == [{"what": "a", "value": "é", "verdict": "note", "advice": "do"}]


def test_a_container_s_limit_is_the_memory(monkeypatch):
    real = doctor.Path.read_text
    monkeypatch.setattr(
        doctor.Path,
        "read_text",
        lambda self, *args, **kwargs: (
            f"{512 * 2**20}\n" if str(self) == "/sys/fs/cgroup/memory.max" else real(self, *args, **kwargs)
        ),
    )
    finding = by_name(diagnose())["memory"]
    assert finding.value == "0.5 GiB (limit of this container)"
    assert finding.verdict == "note"
