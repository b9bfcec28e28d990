"""From a backbone, a protocol and numbers to a result record."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from patchssl.backbone import Backbone
from patchssl.eval.protocols import Protocol
from patchssl.eval.results import Result, library_versions, plain_text
from patchssl.eval.search import faiss_version


def make_record(backbone: Backbone, plan: Protocol, *, dataset: str, fingerprints: Iterable[str],
                metrics: Mapping[str, float], detail: Mapping[str, Any], device: str, duration: float,
                task: str | None = None) -> Result:
    """The record of `backbone` under the protocol `plan`; `task` (default: the protocol's) names the cell.

    `fingerprints` are those of the image sets that the numbers depend on, in a fixed order; `metrics` fractions,
    `detail` plain JSON values, `device` from `features.describe_device`, `duration` in seconds.
    """
    return Result(
        model=plain_text(backbone.name), method=backbone.method, arch=backbone.arch,
        weights_sha256=backbone.weights_sha256, pretrain_data=backbone.pretrain_data,
        pretrain_epochs=backbone.pretrain_epochs, seed=backbone.seed,
        task=task or plan.task, dataset=plain_text(dataset), dataset_fingerprint=joined(fingerprints),
        protocol=plan.name, protocol_version=plan.version, protocol_settings=plan.plain_settings(),
        protocol_fingerprint=plan.fingerprint, metrics=dict(metrics), detail=dict(detail),
        versions={**library_versions(), "faiss": faiss_version()}, device=device, duration=duration,
    )


def joined(fingerprints: Iterable[str]) -> str:
    """One fingerprint of several, in their order."""
    return hashlib.sha256(" ".join(fingerprints).encode()).hexdigest()
