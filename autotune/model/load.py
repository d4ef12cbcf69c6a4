"""Load a model and its tokenizer by the name given on the command line: a directory, a GGUF file or a hub name."""

from __future__ import annotations

import logging
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..machine.cache_dir import expanded
from . import seam
from .checkpoint import with_all_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger("autotune")

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "spiece.model")
MOST_SAID = 300  # characters of another library's error that a message quotes at most
EXPECTED = "expected a directory saved by save_pretrained, a .gguf file, or a model name on the hub"


def load(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal LM in evaluation mode. Code shipped with a model is never run.

    Args:
        name: a local directory, a GGUF file or a hub name.
        dtype: of the weights; default as stored (float32 for GGUF).
        device: default the GPU if there is one.
        revision: branch, tag or commit of a model on the hub; default its main branch.

    Returns:
        The model, and its tokenizer or None if it has none.

    Raises:
        UnsupportedModelError: there is no such model, or it is not a causal LM that transformers itself implements.
    """
    source = locate(name)
    if revision is not None and source.exists():
        raise UnsupportedModelError(f"{source} is on this machine, and has no revisions; name a hub model")
    if source.suffix == ".gguf" and source.is_file():
        from .gguf import checkpoint

        source = checkpoint(source, dtype or torch.float32)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": source.is_dir() or _offline()}
    if revision is not None:
        options["revision"] = revision
    where = str(source)
    config = _config(where, options)
    refuse(config, where)
    if source.is_dir():
        _require_room(config, source)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = with_all_weights(where, source, dtype=dtype or "auto", **options)
    except UnsupportedModelError:
        raise
    except Exception as error:  # damaged or unsuitable files may raise any exception
        raise UnsupportedModelError(f"{where} cannot be loaded: {_gist(error)}") from error
    nn.Module.to(model, device)
    return model, _tokenizer(where, options)


def locate(name: str | Path) -> Path:
    """Return the model's directory or file, or its hub name unchanged.

    Raises:
        UnsupportedModelError: the name looks like a path, but nothing usable is there.
    """
    text = str(name)
    path = expanded(text)
    try:
        found = _located(path)
    except (OSError, ValueError) as error:  # the name is too long, not accessible, or contains a NUL
        raise UnsupportedModelError(f"{text[:200]} cannot be looked at ({error}); {EXPECTED}") from error
    parts = text.split("/")
    if found is None and (len(parts) > 2 or not all(parts) or parts[0] in (".", "..", "~") or path.suffix == ".gguf"):
        raise UnsupportedModelError(f"there is no file or directory {text}; {EXPECTED}")
    return found or Path(text)


def _located(path: Path) -> Path | None:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(f"the directory {path} has no config.json; {EXPECTED}{_ggufs(path)}")
        return path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise UnsupportedModelError(f"{path} is neither a directory nor a .gguf file; {EXPECTED}")
    return None


def _offline() -> bool:
    """Whether the hub cannot be reached. Its name is looked up, because its client retries for half a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return bool(constants.HF_HUB_OFFLINE)
    try:
        socket.getaddrinfo(urllib.parse.urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _ggufs(folder: Path) -> str:
    found = sorted(p.name for p in folder.glob("*.gguf"))
    return f" (it does have {found[0]}: name that file)" if found else ""


def _config(where: str, options: dict[str, Any]) -> PretrainedConfig:
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(where, **options)
    except (ValueError, KeyError) as error:
        raise UnsupportedModelError(
            f"{where} is not a model that transformers itself implements ({_gist(error)}); "
            "code that comes with a model is not run here: load it yourself and call autotune.wrap"
        ) from error
    except Exception as error:  # OSError, or any exception from a damaged file
        if Path(where).is_dir() or not isinstance(error, OSError):
            raise UnsupportedModelError(f"{where} cannot be loaded: {_gist(error)}") from error
        raise UnsupportedModelError(
            f"there is no directory {where}, and the model hub cannot be reached or has no such model; {EXPECTED}"
        ) from error
    return config


def refuse(config: PretrainedConfig, where: str) -> None:
    """Refuse a model that is not a causal LM before its weights are read.

    Raises:
        UnsupportedModelError: the model is encoder-decoder, encoder-only, or has no language-model head.
    """
    for key, value in _sizes(config).items():
        if value < 1:
            raise UnsupportedModelError(f"the configuration of {where} says {key}: {value}; expected 1 or more")
    kind, causal = config.model_type, seam.causal_lms()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{where} is an encoder-decoder model ({kind}); autotune tunes decoder-only causal LMs"
        )
    listed = config.architectures or ()
    classes = {listed} if isinstance(listed, str) else set(map(str, listed))
    if kind not in causal or (classes and not classes & _names(causal.values())):
        shown = ", ".join(sorted(classes)) or kind
        raise UnsupportedModelError(f"{where} is a {shown}, which does not generate text; autotune tunes causal LMs")


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    text = config.get_text_config(decoder=True)
    found = {key: getattr(text, key, None) for key in ("num_hidden_layers", "hidden_size", "vocab_size")}
    return {key: value for key, value in found.items() if isinstance(value, int)}


def _require_room(config: PretrainedConfig, folder: Path) -> None:
    """Refuse more layers than the files can hold: building them would take hours and all memory.

    A layer has at least the weights of a norm, and every format takes at least half a byte per weight.
    """
    sizes = _sizes(config)
    layers, width = sizes.get("num_hidden_layers", 0), sizes.get("hidden_size", 0)
    held = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if layers * width // 2 > held:
        raise UnsupportedModelError(
            f"the configuration of {folder} says num_hidden_layers: {layers}; {held} bytes of files cannot hold them"
        )


def _names(values: Any) -> set[str]:
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def _tokenizer(where: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:  # missing or damaged files may raise any exception
        there = [name for name in TOKENIZERS if (Path(where) / name).exists()]
        if not there:
            if not Path(where).is_dir():  # a hub's name, whose files are elsewhere
                log.warning("%s is used without a tokenizer, which could not be loaded: %s", where, _gist(error))
            return None
        raise UnsupportedModelError(
            f"the tokenizer of {where} ({', '.join(there)}) cannot be loaded: {_gist(error)}; "
            "repair it, or remove its files and give prompts as token ids"
        ) from error
    return tokenizer


def _gist(error: Exception) -> str:
    """Shorten a library's error to one line. It begins with the type if the text alone is not enough."""
    said = " ".join(str(error).split())
    if "ignore_mismatched_sizes" in said:
        return "weights have other shapes than its configuration asks for"
    if isinstance(error, (OSError, ValueError)):
        return said[:MOST_SAID] or type(error).__name__
    return f"{type(error).__name__}: {said[:MOST_SAID]}"
