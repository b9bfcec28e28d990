"""What an examination found: a verdict and a sentence each, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Verdict = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the examination: what was looked at, what is there, and what to do about it."""

    what: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def as_text(findings: Iterable[Finding]) -> str:
    """The findings as aligned lines, advice below what it is about, and a closing sentence."""
    findings = list(findings)
    width = max((len(finding.what) for finding in findings), default=0)
    signs = {"ok": " ", "note": "-", "problem": "!"}
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.verdict]} {finding.what:{width}}  {finding.value}".rstrip())
        if finding.advice:
            lines.append(f"  {'':{width}}  -> {finding.advice}")
    problems = sum(finding.verdict == "problem" for finding in findings)
    closing = f"{problems} problem{'s' * (problems > 1)}, marked with !" if problems else "no problems"
    return "\n".join([*lines, "", closing])


def as_json(findings: Iterable[Finding]) -> str:
    """The findings as a JSON list of objects."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)
