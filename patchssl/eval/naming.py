"""Names in records: what a table, a figure or a page shows as it is, and how any other name is written so that it does.

A record that `eval` writes is one that `tables` takes, whatever its network and images are called; a record from
elsewhere whose names break the rule was made to harm a reader, and is skipped.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath

_TAG = re.compile(r"<(?=\s*[a-z!/?])", re.IGNORECASE)
_LONGEST = 500  # characters of a name or setting


def fault_of(text: str) -> str | None:
    """What is wrong with a name; None for one that can be shown.

    >>> fault_of("vit <b>"), fault_of("a < 3")
    ("holds HTML: 'vit <b>'", None)
    """
    if len(text) > _LONGEST:
        return f"has {len(text):,} characters"
    if _TAG.search(text):
        return f"holds HTML: {text[:60]!r}"
    return None if text.isprintable() else f"holds characters that cannot be printed: {text[:60]!r}"


def leads_out(name: str) -> bool:
    """Is `name` a path to somewhere else than below a folder?

    >>> leads_out("../x"), leads_out("/etc/x"), leads_out("a\\\\..\\\\b"), leads_out("strong/..jpg")
    (True, True, True, False)
    """
    plain = name.replace("\\", "/")
    return plain.startswith("/") or ":/" in plain or ".." in PurePosixPath(plain).parts


def shown_name(name: str) -> str:
    r"""`name` as a record holds it: itself where nothing speaks against it, else without what does.

    >>> shown_name("timm:vit_tiny"), shown_name("my\tnet <b>"), shown_name("../runs/a"), shown_name("caf\udce9")
    ('timm:vit_tiny', 'my\\tnet ‹b>', '…/runs/a', 'caf\\udce9')
    """
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in name)
    if leads_out(text):
        parts = text.replace("\\", "/").lstrip("/").split("/")
        text = re.sub(":/+", ":", "/".join("…" if part == ".." else part for part in parts)).lstrip("/")
    text = _TAG.sub("‹", text)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return text or "unnamed"
