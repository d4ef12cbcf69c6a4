"""A recorded baseline on disk: a folder of three files.

    manifest.json           schema, recorded model and machine, latency samples, and the hashes of the other two
    exam.json               prompts and texts as token ids, labelled tasks and their outcomes
    reference.safetensors   the model's distribution at every scored position (in 16 bits: in a full forward, and in
                            decoding step by step), and sketches of its layers' outputs

A folder is written completely or not at all. Only its owner can read it, because prompts may be private. Reading checks
the hashes, which detects damage and edits. It does not protect against someone who writes matching hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...errors import BaselineError, MeasurementError, PlanError
from ...tune import codec
from .baseline import Baseline, Environment, LatencySamples, Questions, Subject
from .compact import Compact
from .tasks import Suite

SCHEMA = 1
KIND = "autotune baseline"
MANIFEST, EXAM, REFERENCE = "manifest.json", "exam.json", "reference.safetensors"
MAX_BYTES = {MANIFEST: 16 << 20, EXAM: 512 << 20, REFERENCE: 16 << 30}
RECORD_AGAIN = "record it again with `autotune check record`"


@dataclass(frozen=True)
class _Manifest:
    subject: Subject
    environment: Environment
    pace: tuple[LatencySamples, ...]
    created: str
    files: Mapping[str, str] = field(default_factory=dict)  # name -> SHA-256


@dataclass(frozen=True)
class _Exam:
    questions: Questions
    suites: tuple[Suite, ...]


def save(baseline: Baseline, folder: Path, *, force: bool = False) -> None:
    """Write a baseline completely or not at all, readable only by its owner.

    Raises:
        BaselineError: the folder exists and `force` is False, or it is not a baseline.
        MeasurementError: the folder cannot be written.
    """
    from safetensors.torch import save as to_bytes

    require_free(folder, force)
    tensors = {**_tensors("answers", baseline.answers), **_tensors("stepped", baseline.stepped)}
    tensors |= {f"layers.{k}.{name}": t for k, (name, t) in enumerate(baseline.layers.items())}
    contents = {
        EXAM: codec.dumps(_Exam(baseline.questions, baseline.suites)).encode(),
        REFERENCE: to_bytes(tensors),
    }
    files = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = _Manifest(baseline.subject, baseline.environment, baseline.pace, baseline.created, files)
    body = {"kind": KIND, "schema": SCHEMA, **codec.encode(manifest)}
    contents[MANIFEST] = json.dumps({**body, "digest": _digest(body)}, allow_nan=False, indent=1).encode()
    try:
        _write(folder, contents)
    except OSError as error:
        raise MeasurementError(f"the baseline {folder} cannot be written: {error.strerror}") from error


def require_free(folder: Path, force: bool = False) -> None:
    """Refuse to overwrite existing content, before the long work begins.

    Raises:
        BaselineError: the folder exists and `force` is False, or it is not a baseline.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    names = {file.name for file in folder.iterdir()} if folder.is_dir() else set()
    if MANIFEST not in names or names - MAX_BYTES.keys():
        raise BaselineError(f"{folder} exists and is not a baseline; name a folder that does not exist yet")
    if not force:
        raise BaselineError(f"there is a baseline in {folder} already; --force (force=True) replaces it")


def _write(folder: Path, contents: Mapping[str, bytes]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))  # mode 0700
    try:
        for name, content in contents.items():
            descriptor = os.open(fresh / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-old-"))
            os.rename(folder, old)  # replaces the empty folder
            os.rename(fresh, folder)
            shutil.rmtree(old)
        else:
            os.rename(fresh, folder)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(fresh)
        raise


def load(folder: str | Path) -> Baseline:
    """Read a baseline.

    Raises:
        BaselineError: the folder does not exist, is not a baseline, or has another schema.
        MeasurementError: the baseline is incomplete or was changed since it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    folder = Path(folder)
    manifest = _manifest(folder)
    contents = {name: _verified(folder, name, manifest.files) for name in (EXAM, REFERENCE)}
    try:
        exam: _Exam = codec.decode(_Exam, codec.loads(contents[EXAM]), EXAM)
        tensors = from_bytes(contents[REFERENCE])
        layers = {int(k): (name, t) for (_, k, name), t in _layers(tensors)}
        counts = [sum(len(text.scored) for text in group) for group in exam.questions.groups]
        answers, stepped = (_compact(name, tensors, counts) for name in ("answers", "stepped"))
        if not answers:
            raise ValueError("there are no answers")
    except (PlanError, SafetensorError, TypeError, ValueError, RuntimeError) as error:
        raise MeasurementError(f"the baseline {folder} is damaged ({error}): {RECORD_AGAIN}") from error
    return Baseline(
        manifest.subject,
        manifest.environment,
        exam.questions,
        answers,
        dict(layers[k] for k in sorted(layers)),
        manifest.pace,
        exam.suites,
        manifest.created,
        stepped,
    )


def _tensors(name: str, answers: Sequence[Compact]) -> dict[str, torch.Tensor]:
    """The tensors that hold some answers, by their names in the file; none if there are no answers."""
    joined = Compact.joined(answers).tensors() if answers else {}
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in joined.items()}


def _compact(name: str, tensors: Mapping[str, torch.Tensor], counts: Sequence[int]) -> tuple[Compact, ...]:
    """Undo `_tensors`, for groups of `counts` scored tokens."""
    parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
    return tuple(Compact(**parts).split(counts)) if parts else ()


def _layers(tensors: Mapping[str, torch.Tensor]) -> list[tuple[list[str], torch.Tensor]]:
    """("layers", number, stage name) of each layer's sketches."""
    return [(name.split(".", 2), tensor) for name, tensor in tensors.items() if name.startswith("layers.")]


def _manifest(folder: Path) -> _Manifest:
    if not (folder / MANIFEST).is_file():
        what = "has no manifest.json" if folder.is_dir() else "does not exist"
        raise BaselineError(f"{folder} is not a baseline (it {what}): make one with `autotune check record`")
    try:
        body = codec.loads(_content(folder / MANIFEST))
    except PlanError as error:
        raise MeasurementError(f"the baseline {folder} is damaged ({MANIFEST}: {error}): {RECORD_AGAIN}") from error
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise BaselineError(f"{folder / MANIFEST} belongs to something else; expected an {KIND}")
    if (schema := body.get("schema")) != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        hint = "a later version of autotune wrote it: update, or" if newer else "this version reads other baselines:"
        raise BaselineError(f"the baseline {folder} has schema {schema!r}, expected {SCHEMA}; {hint} {RECORD_AGAIN}")
    digest = body.pop("digest", None)
    if digest != _digest(body):
        raise MeasurementError(f"the baseline {folder} was changed since it was written ({MANIFEST}): {RECORD_AGAIN}")
    values = {name: value for name, value in body.items() if name not in ("kind", "schema")}
    try:
        manifest: _Manifest = codec.decode(_Manifest, values, MANIFEST)
    except PlanError as error:
        raise MeasurementError(f"the baseline {folder} is damaged ({error}): {RECORD_AGAIN}") from error
    return manifest


def _verified(folder: Path, name: str, files: Mapping[str, str]) -> bytes:
    """Read a file, and verify its hash before the content is used."""
    content = _content(folder / name)
    if hashlib.sha256(content).hexdigest() != files.get(name):
        raise MeasurementError(f"the baseline {folder} is torn or was changed since ({name}): {RECORD_AGAIN}")
    return content


def _content(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES[file.name]:
            raise MeasurementError(f"{file} is larger than a file of a baseline can be: {RECORD_AGAIN}")
        return file.read_bytes()
    except OSError as error:
        raise MeasurementError(f"{file} cannot be read ({error.strerror}): {RECORD_AGAIN}") from error


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
