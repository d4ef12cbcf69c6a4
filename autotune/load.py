"""A model and its tokenizer from what the command line names: a directory, a GGUF file or a model on the hub."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import seam
from .errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

NAMED = 3  # of missing weights
EXPECTED = "expected a directory saved by save_pretrained, a .gguf file, or a model name on the hub"


def load(
    name: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a causal LM in evaluation mode. Code shipped with a model is never run.

    Args:
        name: a local directory, a GGUF file or a hub name.
        dtype: of the weights; default as stored (float32 for GGUF).
        device: default the GPU where there is one.

    Returns:
        The model, and its tokenizer or None where it has none.

    Raises:
        UnsupportedModelError: there is no such model, or it is not a causal LM that transformers itself implements.
    """
    source = locate(name)
    if source.suffix == ".gguf" and source.is_file():
        from .convert import checkpoint

        source = checkpoint(source, dtype or torch.float32)
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": source.is_dir() or _offline()}
    where = str(source)
    refuse(_config(where, options), where)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = with_all_weights(where, source, dtype=dtype or "auto", **options)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever damaged or unfit files make their reader raise
        raise UnsupportedModelError(f"{where} cannot be loaded: {_first_line(error)}") from error
    nn.Module.to(model, device)
    return model, _tokenizer(where, options)


def with_all_weights(where: str | Path, source: Path, **options: Any) -> PreTrainedModel:
    """`from_pretrained`, which fills in at random what a checkpoint lacks, without that.

    Args:
        where: directory or hub name.
        source: what the user named.
        options: of `from_pretrained`.

    Raises:
        UnsupportedModelError: weights are missing.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        raise UnsupportedModelError(
            f"{source} lacks {len(missing)} of the weights that its configuration asks for: {named}; "
            "expected a whole checkpoint: save or download it again"
        )
    return model


def locate(name: str | Path) -> Path:
    """The model's directory or file, or its hub name as it stands.

    Raises:
        UnsupportedModelError: it looks like a path and nothing usable is there.
    """
    text = str(name)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UnsupportedModelError(f"the directory {path} has no config.json; {EXPECTED}{_ggufs(path)}")
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModelError(f"{path} is neither a directory nor a .gguf file; {EXPECTED}")
        return path
    parts = text.split("/")
    if len(parts) > 2 or not all(parts) or parts[0] in (".", "..", "~") or path.suffix == ".gguf":
        raise UnsupportedModelError(f"there is no file or directory {text}; {EXPECTED}")
    return Path(text)


def _offline() -> bool:
    """Whether the hub's name leads nowhere: known in an instant, where its client retries for half a minute."""
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
            f"{where} is not a model that transformers itself implements ({_first_line(error)}); "
            "code that comes with a model is not run here: load it yourself and call autotune.wrap"
        ) from error
    except OSError as error:
        if Path(where).is_dir():
            raise UnsupportedModelError(f"{where} cannot be loaded: {_first_line(error)}") from error
        raise UnsupportedModelError(
            f"there is no directory {where}, and the model hub cannot be reached or has no such model; {EXPECTED}"
        ) from error
    return config


def refuse(config: PretrainedConfig, where: str) -> None:
    """Refuse what is no causal LM before its weights are read.

    Raises:
        UnsupportedModelError: encoder-decoder, encoder-only, or nothing with a language-model head.
    """
    kind, causal = config.model_type, seam.causal_lms()
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{where} is an encoder-decoder model ({kind}); autotune tunes decoder-only causal LMs"
        )
    classes = set(config.architectures or ())
    if kind not in causal or (classes and not classes & _names(causal.values())):
        shown = ", ".join(sorted(classes)) or kind
        raise UnsupportedModelError(f"{where} is a {shown}, which does not generate text; autotune tunes causal LMs")


def _names(values: Any) -> set[str]:
    return {name for value in values for name in ((value,) if isinstance(value, str) else value)}


def _tokenizer(where: str, options: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # what transformers raises where files are missing
        return None
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
