"""The attention function that a model looks up by name, and how to register one of ours."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch

UNUSUAL = ("softcap", "s_aux", "position_bias", "cache")  # attention arguments that only SDPA's function accepts
SUPPORTS = {"sdpa": "_supports_sdpa", "flash": "_supports_flash_attn", "flex": "_supports_flex_attn"}

Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]  # an attention function; returns [B, Q, H, D], weights


def attention_of(model_or_config: Any) -> str:
    """Name of the attention implementation that a model or a configuration asks for."""
    config = getattr(model_or_config, "config", model_or_config)
    name: str = config._attn_implementation
    return name


def attentions_of(model: torch.nn.Module) -> set[str]:
    """Names of the implementations that the modules of a model will look up."""
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    return {attention_of(c) for c in configs if hasattr(c, "_attn_implementation")}


def use_attention(model: Any, name: str) -> None:
    """Make a model look up another implementation.

    Raises:
        ValueError, ImportError: the model does not accept this implementation.
    """
    model.set_attn_implementation(name)


def with_attention(config: Any, name: str) -> Any:
    """A copy of one module's configuration that asks for another implementation, unchecked."""
    other = copy.copy(config)
    other._attn_implementation_internal = name
    return other


def exchangeable_attention(model: Any) -> bool:
    """Whether a model looks its attention function up by name."""
    return bool(model._can_set_attn_implementation())


def supports(model: Any, kind: Literal["sdpa", "flash", "flex"]) -> bool:
    """Whether a model says that it works with a kind of attention."""
    return bool(getattr(model, SUPPORTS[kind], False))


def attention_function(name: str, eager: Attend) -> Attend:
    """The function registered under a name. For "eager", it is `eager`, the model's own function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    find = getattr(ALL_ATTENTION_FUNCTIONS, "get_interface", None)
    if find is not None:
        found: Attend = find(name, eager)
        return found
    named: Attend = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    return named


def register_attention(name: str, function: Attend, masks: bool = True) -> None:
    """Register an attention function under a name.

    Args:
        masks: whether transformers makes masks for it, as for SDPA.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    if masks:
        AttentionMaskInterface.register(name, sdpa_mask)


def sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' own SDPA function: query [B, H, Q, D], key and value [B, Hk, T, D] -> [B, Q, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    return out, None


def accepts_package(implementation: str) -> bool:
    """Whether transformers would use the installed flash-attn package of this name, and not look for a substitute."""
    from transformers import utils

    accepts = getattr(utils, f"is_flash_attn_{implementation.removeprefix('flash_attention_')}_available", None)
    return accepts is None or bool(accepts())
