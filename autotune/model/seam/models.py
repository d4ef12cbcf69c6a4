"""Other internals of transformers: attributes of models, their classes and their configurations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPILED = ("_compiled_call", "_last_compile_config")  # where generate keeps a model's compiled forward
SET_AT_WILL = {  # attributes that generate sets on a model and that do not affect what it computes
    *("generation_config", "warnings_issued", "_cache", "_previous_max_cache_length"),
    *("_output_capturing_hooks_installed", *COMPILED),
    "rope_deltas",  # of models of text and images, written anew for each prompt
}
ROTARY, EAGER = "apply_rotary_pos_emb", "eager_attention_forward"  # functions in each model's Python module


def uncompiled(twin: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model without the compiled forward that belongs to the model it was copied from."""
    for leftover in COMPILED:
        twin.__dict__.pop(leftover, None)
    return twin


def keep_compiled(alias: PreTrainedModel, model: PreTrainedModel) -> None:
    """Keep the compiled forward that generate left on an alias, which lives for one call: the next ones need it."""
    model.__dict__.update({name: alias.__dict__[name] for name in COMPILED if name in alias.__dict__})


def is_own_hook(hook: Any) -> bool:
    """Whether a forward hook is one of transformers' own, which change no answer.

    These are the collectors of hidden states and attentions, idle until requested (from 5.2), and the hook that makes
    embeddings require gradients.
    """
    module = getattr(hook, "__module__", None) or ""
    return module.startswith("transformers.") and not module.startswith("transformers.debug_utils")


def experts(model: Any) -> str:
    """Name of the implementation that computes a mixture of experts; "" if the model or release has only one."""
    known = getattr(model, "get_experts_implementation", None)
    return str(known()) if known is not None else ""


def exchanges_experts(model: Any) -> bool:
    """Whether generate exchanges the implementation of a mixture of experts while it decodes (from 5.24, on a GPU)."""
    known = getattr(model, "get_experts_implementation", None)
    if known is None or model.device.type == "cpu":
        return False
    found = known()
    return not {"grouped_mm", "batched_mm"}.isdisjoint(found.values() if isinstance(found, dict) else [found])


def layer_configurations(config: Any) -> list[Any]:
    """Configuration of each layer: the same for all, or one per layer where they differ, as in Gemma 4."""
    count = getattr(config, "num_hidden_layers", 0)
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[number] for number in range(count)]
    return [config] * count


def conv1d() -> type[torch.nn.Module]:
    """The linear layer of GPT-2's family, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def configurations() -> tuple[type, ...]:
    """Base classes of all configurations."""
    from transformers import GenerationConfig, PretrainedConfig

    return PretrainedConfig, GenerationConfig


def causal_lms() -> Mapping[str, str]:
    """Model type -> name of its causal LM class."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def causal_lm(kind: str) -> tuple[Any, Any]:
    """The causal LM class of a model type, and its default configuration."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.for_model(kind)
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cls: Any = found[0] if isinstance(found, tuple) else found
    if cls.config_class is getattr(config, "sub_configs", {}).get("text_config"):  # as AutoModelForCausalLM does
        config = config.get_text_config()
    return cls, config


def forward_function(module: torch.nn.Module) -> Any:
    """The forward that a module's class defines, without its decorators."""
    return inspect.unwrap(type(module).forward)
