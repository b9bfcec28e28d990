"""`cache` and `doctor`: what is kept on this machine, and what is installed."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from patchssl.cli.options import JsonOpt, echo


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Features that evaluations keep, and indexes of large archives and folders: where, how many, how large.

    PATCHSSL_CACHE names another folder, PATCHSSL_CACHE_GIB says how many GiB of features are kept (20).
    """
    from patchssl.eval.cache import FeatureCache
    from patchssl.runtime.files import clear_indexes, index_bytes

    kept = FeatureCache()
    entries = kept.entries()
    size, indexes = sum(entry.size for entry in entries) + kept.begun_bytes(), index_bytes()
    if clear:
        kept.clear()
        clear_indexes()
    if as_json:
        echo(json.dumps({"folder": str(kept.folder), "entries": len(entries), "bytes": size,
                         "limit_bytes": kept.limit, "index_bytes": indexes, "cleared": clear}))
    else:
        echo(f"{kept.folder}: {len(entries):,} entries, {size / 2**20:,.1f} MiB of at most "
             f"{kept.limit / 2**30:g} GiB, and {indexes / 2**20:,.1f} MiB of indexes"
             + (", removed" if clear else ""))


def doctor(as_json: JsonOpt = False) -> None:
    """What is installed and what will be used: torch, devices, FAISS, extras, cache folders."""
    from patchssl.cli.doctor import diagnose
    from patchssl.runtime.findings import as_json as findings_json
    from patchssl.runtime.findings import as_text

    findings = diagnose()
    echo(findings_json(findings) if as_json else as_text(findings))
    if any(finding.verdict == "problem" for finding in findings):
        raise typer.Exit(1)
