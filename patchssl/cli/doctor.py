"""What is installed, what will be used, and what stands in the way. Never touches the network.

Packages are looked up by their metadata; only torch, torchvision and the search backend are imported, and one
that fails to import is a finding like any other.
"""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from patchssl import __version__
from patchssl.eval.tasks import all_tasks, default_tasks
from patchssl.runtime.findings import Finding, Verdict

PACKAGE = "patchssl"
CORE = ("torch", "torchvision", "timm", "numpy")  # looked up when no metadata says what is needed
GIB = 2**30


def diagnose(environ: Mapping[str, str] | None = None) -> list[Finding]:
    """Examine this machine and installation; `environ` stands in for the process's environment variables."""
    variables = os.environ if environ is None else environ
    checks: list[Callable[[], Iterable[Finding]]] = [
        _examine_packages, _examine_torch, _examine_search, _examine_extras, _examine_tasks, _examine_resources,
        lambda: _examine_folders(variables), lambda: _examine_offline(variables)]
    return [finding for check in checks for finding in check()]


def _examine_packages() -> Iterable[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    installed = _version(PACKAGE)
    yield Finding(PACKAGE, f"{__version__}{'' if installed else ', running from its source folder'}",
                  "ok" if installed else "note", "" if installed else "install it: pip install .")
    for need in requirements() if installed else [Requirement(name, "") for name in CORE]:
        if need.extra:
            continue
        yield _finding(need, "problem", f"pip install '{need.name}{need.bounds}'")


def _examine_extras() -> Iterable[Finding]:
    extras: dict[str, list[Requirement]] = {}
    for need in requirements():
        if need.extra:
            extras.setdefault(need.extra, []).append(need)
    for name, needs in sorted(extras.items()):
        missing = [need.name for need in needs if not _is_met(need)]
        value = f"not complete, without {', '.join(missing)}" if missing else "installed"
        advice = f"if wanted: pip install '{PACKAGE}[{name}]', or '.[{name}]' in the source folder"
        yield Finding(f"extra {name}", value, "note" if missing else "ok", advice if missing else "")


def _examine_tasks() -> Iterable[Finding]:
    tasks = all_tasks()
    asked = [name for name, task in tasks.items() if not task.by_default]
    yield Finding("benchmarks", ", ".join(default_tasks()) + (f"; on request {', '.join(asked)}" if asked else ""))


def _examine_torch() -> Iterable[Finding]:
    torch, reason = _try_import("torch")
    if torch is None:
        yield Finding("torch build", f"cannot be imported: {reason}", "problem",
                      "reinstall it, see https://pytorch.org/get-started")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    build = f"ROCm {torch.version.hip}" if torch.version.hip else build
    yield Finding("torch build", build)
    _, reason = _try_import("torchvision")
    if reason:
        yield Finding("torchvision build", f"cannot be imported: {reason}", "problem",
                      "torch and torchvision come in pairs: pip install --upgrade torch torchvision")
    threads = torch.get_num_threads()
    yield Finding("processors", f"{_num_cores()} usable, torch computes with {threads} threads")
    yield from _examine_gpus(torch)


def _examine_gpus(torch: Any) -> Iterable[Finding]:
    if not torch.cuda.is_available():
        if torch.version.cuda and shutil.which("nvidia-smi"):
            yield Finding("GPU", "there is a driver, but torch sees no GPU", "note",
                          "compare nvidia-smi's CUDA version with torch's, and look at CUDA_VISIBLE_DEVICES")
        else:
            yield Finding("GPU", "none: everything runs on the CPU, in float32")
        return
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        native = bool(torch.version.hip) or facts.major >= 8  # NVIDIA's earlier ones emulate bfloat16
        value = f"{facts.name}, {facts.total_memory / GIB:.0f} GiB, {'bfloat16' if native else 'no bfloat16'}"
        yield Finding(f"GPU cuda:{index}", value, "ok" if native else "note",
                      "" if native else "optim.precision=fp32 may be faster")


def _examine_search() -> Iterable[Finding]:
    try:
        search = importlib.import_module("patchssl.eval.search")
        torch = importlib.import_module("torch")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        value = str(search.describe_backend(device))
    except Exception as error:  # a broken library must not hide the other findings
        yield Finding("k-NN search", f"cannot be looked at: {_sentence(error)}", "problem")
        return
    absent = "FAISS cannot be imported" in value
    advice = "the same neighbors; FAISS comes as faiss-gpu (Linux x86-64) or faiss-cpu" if absent else ""
    yield Finding("k-NN search", value, "note" if absent else "ok", advice)
    both = [name for name in ("faiss-gpu", "faiss-cpu") if _version(name)]
    if len(both) > 1:
        yield Finding("FAISS packages", "faiss-gpu and faiss-cpu overwrite each other's files", "problem",
                      "pip uninstall faiss-cpu faiss-gpu, then install one of them")


def _examine_resources() -> Iterable[Finding]:
    memory, limit = _memory_bytes()
    if memory:
        bound = " (limit of this container)" if limit else ""
        yield Finding("memory", f"{memory / GIB:.1f} GiB{bound}", "ok" if memory >= 2 * GIB else "note",
                      "" if memory >= 2 * GIB else "the quickstart wants 2 GiB; lower optim.batch_size")
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{free / GIB:.1f} GiB free in {Path.cwd()}", "ok" if free >= GIB else "note",
                  "" if free >= GIB else "checkpoints of large networks may not fit")
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < GIB:
        mebibytes = shutil.disk_usage(shared).total / 2**20
        yield Finding("shared memory", f"{mebibytes:.0f} MiB in {shared}", "note",
                      "batches that do not fit into it go through pipes, which is slower: docker run --shm-size=8g")


def _examine_folders(variables: Mapping[str, str]) -> Iterable[Finding]:
    for what, path, advice in cache_folders(variables):
        missing = "" if path.exists() else " (not there yet)"
        if _is_writable(path):
            yield Finding(what, f"{path}{missing}")
        else:
            yield Finding(what, f"{path} cannot be written", "note", advice)


def _examine_offline(variables: Mapping[str, str]) -> Iterable[Finding]:
    offline = variables.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    yield Finding("HF_HUB_OFFLINE", "set: weights come from the cache only" if offline else
                  "not set: weights of timm: and hf-hub: models are downloaded once")


def cache_folders(variables: Mapping[str, str]) -> list[tuple[str, Path, str]]:
    """Name, path and advice of the folders that libraries write to, by their environment variables."""
    home = Path(variables.get("HOME") or Path.home())
    cache = Path(variables.get("XDG_CACHE_HOME") or home / ".cache")
    hugging_face = Path(variables.get("HF_HOME") or cache / "huggingface")
    hub = Path(variables.get("HF_HUB_CACHE") or hugging_face / "hub")
    torch_hub = Path(variables.get("TORCH_HOME") or cache / "torch") / "hub"
    plots = Path(variables.get("MPLCONFIGDIR") or cache / "matplotlib")
    return [("Hugging Face cache", hub, "set HF_HOME to a folder that can be written"),
            ("torch hub cache", torch_hub, "set TORCH_HOME to a folder that can be written"),
            ("matplotlib cache", plots, "set MPLCONFIGDIR to a folder that can be written")]


@dataclass(frozen=True)
class Requirement:
    """One requirement of the installed package that applies to this platform."""

    name: str
    bounds: str  # ">=2.6", or ""
    extra: str = ""  # the extra that asks for it


def requirements() -> list[Requirement]:
    """What the installed package asks for here; empty where it is not installed."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return []
    return [need for need in map(parse_requirement, lines) if need]


def parse_requirement(line: str) -> Requirement | None:
    """A requirement of package metadata; None if its marker leaves this platform out.

    >>> parse_requirement("lightly>=1.5; extra == 'bench'")
    Requirement(name='lightly', bounds='>=1.5', extra='bench')
    """
    from packaging.requirements import Requirement as Parsed  # ships with huggingface_hub

    parsed = Parsed(line)
    name, bounds = parsed.name, str(parsed.specifier)
    if parsed.marker is None or parsed.marker.evaluate({"extra": ""}):
        return Requirement(name, bounds)
    extras = re.findall(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
    asking = (extra for extra in extras if parsed.marker.evaluate({"extra": extra}))
    return next((Requirement(name, bounds, extra) for extra in asking), None)


def _finding(need: Requirement, verdict: Verdict, advice: str) -> Finding:
    found = _version(need.name)
    if found is None:
        return Finding(need.name, "not installed", verdict, advice)
    if not _is_met(need):
        return Finding(need.name, f"{found}, {need.bounds} is needed", verdict, advice)
    return Finding(need.name, found)


def _is_met(need: Requirement) -> bool:
    from packaging.specifiers import SpecifierSet

    found = _version(need.name)
    return found is not None and SpecifierSet(need.bounds).contains(found, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _try_import(name: str) -> tuple[Any, str]:
    """The module and "", or None and why it cannot be imported."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # broken builds raise OSError or RuntimeError as well
        return None, _sentence(error)


def _sentence(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _num_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _memory_bytes() -> tuple[int, bool]:
    """Memory that this process may use, 0 if unknown, and whether a container limits it."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0, False
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = int(Path(name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return (limit, True) if limit < total else (total, False)
    return total, False


def _is_writable(path: Path) -> bool:
    """Whether `path`, or the nearest folder above it that exists, can be written."""
    nearest = next((folder for folder in (path, *path.parents) if folder.exists()), path)
    return nearest.is_dir() and os.access(nearest, os.W_OK)
