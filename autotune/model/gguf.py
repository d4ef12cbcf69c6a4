"""GGUF files as ordinary checkpoints: dequantised once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from ..errors import UnsupportedModelError
from ..machine import cache_dir

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

CONFIG = "config.json"
WHOLE = "files.json"  # written last: size and digest of every file of a checkpoint
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # blocks of a file to hash, and their size: a crash leaves whole pages of zeros
FORMAT = "1"  # version of the conversion; raise it when the same GGUF file would be converted differently


def checkpoint(gguf: Path, dtype: torch.dtype) -> Path:
    """Return the directory of a plain checkpoint of `gguf`. Convert it if the cache lacks it, which takes a minute.

    Args:
        gguf: a GGUF file.
        dtype: dtype of the stored weights.

    Raises:
        UnsupportedModelError: the package `gguf` is missing, or the file cannot be read or converted.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(f"{gguf} is a GGUF file, which needs the package gguf: pip install gguf")
    cache = cache_dir.cache("models")
    if cache is None:
        raise UnsupportedModelError(f"{gguf} has to be converted, and there is no directory to keep the result in")
    try:
        key = hashlib.sha256(f"{FORMAT} {dtype} {_digest(gguf)}".encode()).hexdigest()[:16]
    except OSError as error:
        raise UnsupportedModelError(f"{gguf} cannot be read: {error.strerror}") from error
    kept = cache / key / (gguf.stem.strip(".") or "model")
    if (defect := _defect(kept.parent)) is not None:
        if kept.parent.exists():
            log.warning("the checkpoint converted earlier into %s is not used: %s", kept, defect)
        log.info("converting %s once into %s", gguf, kept)
        _convert(gguf, dtype, kept)
    return kept


def _defect(folder: Path) -> str | None:
    """What is wrong with the checkpoint in `folder`; None if every file is there, complete and owned by this user."""
    name = WHOLE
    try:
        listed = json.loads(cache_dir.read(folder / WHOLE, 1 << 20))
        if CONFIG not in {Path(each).name for each in listed}:
            return f"there is no {CONFIG}"
        for name, (size, digest) in listed.items():
            if (found := cache_dir.require_own(folder / name).st_size) != size:
                return f"{name} has {found} bytes of {size}"
            if _sampled_digest(folder / name, size) != digest:
                return f"{name} was changed"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{name}: {error}"
    return None


def _sampled_digest(file: Path, size_bytes: int) -> str:
    seen = hashlib.sha256()
    with file.open("rb") as stream:
        for k in range(SAMPLES):
            stream.seek(max(0, size_bytes - SAMPLE_BYTES) * k // (SAMPLES - 1))
            seen.update(stream.read(SAMPLE_BYTES))
            if size_bytes <= SAMPLE_BYTES:
                break
    return seen.hexdigest()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(gguf: Path, dtype: torch.dtype, kept: Path) -> None:
    """Write beside the parent of `kept`, then rename: other processes find a complete checkpoint or none."""
    target = kept.parent
    cache_dir.sweep(target.parent.glob(".draft-*"))
    try:
        with tempfile.TemporaryDirectory(prefix=".draft-", dir=target.parent, ignore_cleanup_errors=True) as folder:
            draft = Path(folder) / target.name
            draft.mkdir(mode=0o700)
            _write(gguf, dtype, draft / kept.name)
            if _defect(target) is None:  # another process was faster
                return
            _discard(target)
            try:
                draft.rename(target)
            except OSError:
                if _defect(target) is not None:
                    raise
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{gguf} cannot be converted into {target}: {error}") from error


def _write(gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoTokenizer

    from .checkpoint import with_all_weights

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        plain = _plain(with_all_weights(gguf.parent, gguf, dtype=dtype, **source))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except UnsupportedModelError:
        raise
    except Exception as error:  # transformers' GGUF reader may raise any exception
        raise UnsupportedModelError(
            f"{gguf} cannot be read as a GGUF model ({type(error).__name__}: {error})"
        ) from error
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _seal(folder)
    os.sync()  # the rename must not overtake the weights


def _seal(folder: Path) -> None:
    """Make a checkpoint private to this user under any umask, and list its files beside it."""
    folder.chmod(0o700)
    listed = {}
    for file in sorted(folder.iterdir()):
        file.chmod(0o600)
        size = file.stat().st_size
        listed[f"{folder.name}/{file.name}"] = size, _sampled_digest(file, size)
    cache_dir.write(folder.parent / WHOLE, [json.dumps(listed).encode()])


def _discard(path: Path) -> None:
    """Remove a directory, file or link of this name. Links are not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the weights into a model without a record of its GGUF origin: transformers refuses to save one with it."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = type(model)(config)
    nn.Module.to(plain, model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
