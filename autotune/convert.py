"""GGUF files as ordinary checkpoints: dequantised once, kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import folders
from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

FORMAT = "1"  # raised when the same GGUF file would be converted differently


def checkpoint(gguf: Path, dtype: torch.dtype) -> Path:
    """The directory of a plain checkpoint of `gguf`, converted unless the cache has it. The first time takes a minute.

    Args:
        gguf: a GGUF file.
        dtype: what the weights are stored as.

    Raises:
        UnsupportedModelError: the package `gguf` is missing, or the file cannot be read or converted.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UnsupportedModelError(f"{gguf} is a GGUF file, which needs the package gguf: pip install gguf")
    cache = folders.cache("models")
    if cache is None:
        raise UnsupportedModelError(f"{gguf} has to be converted, and there is no directory to keep the result in")
    key = hashlib.sha256(f"{FORMAT} {dtype} {_digest(gguf)}".encode()).hexdigest()[:16]
    kept = cache / key / gguf.stem
    if not (kept / "config.json").is_file():
        log.info("converting %s once into %s", gguf, kept)
        _convert(gguf, dtype, kept.parent)
    return kept


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _convert(gguf: Path, dtype: torch.dtype, target: Path) -> None:
    """Write beside `target` and rename: whoever comes second finds a whole checkpoint or none."""
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        _write(gguf, dtype, draft / gguf.stem)
        try:
            draft.rename(target)
        except OSError:  # another process was faster
            if not (target / gguf.stem / "config.json").is_file():
                raise
    except OSError as error:
        raise UnsupportedModelError(f"{gguf} cannot be converted into {target}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write(gguf: Path, dtype: torch.dtype, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=dtype, **source)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    except Exception as error:  # transformers' GGUF reader raises whatever its parsing runs into
        raise UnsupportedModelError(
            f"{gguf} cannot be read as a GGUF model ({type(error).__name__}: {error})"
        ) from error
    _plain(loaded).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    os.sync()  # the rename must not overtake the weights


def _plain(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that does not remember coming from GGUF, which transformers refuses to save."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain: PreTrainedModel = type(model)(config)
    nn.Module.to(plain, model.dtype)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    return plain
