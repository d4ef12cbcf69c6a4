"""What belongs to transformers' insides is named in `model/seam` and nowhere else: read from the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune

ROOT = Path(autotune.__file__).parent
FILES = sorted(p for p in ROOT.rglob("*.py") if "seam" not in p.relative_to(ROOT).parts)
PUBLIC = {  # documented classes and functions that have nothing to do with how a call is computed
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "GenerationConfig",
    "LlamaConfig",
    "LlamaForCausalLM",
    "PreTrainedModel",
    "PreTrainedTokenizerBase",
}
MODULES = {"transformers.utils": {"logging"}}  # submodules, and what may be had from them
INSIDES = {
    # the cache argument, outputs' fields
    "past_key_values",
    "cache_params",
    "GenerateDecoderOnlyOutput",
    "_is_user_defined",
    # the decoding loop, its contract, the mapping of modes
    "_sample",
    "_prefill",
    "GENERATION_MODES_MAPPING",
    "logits_processor",
    "stopping_criteria",
    "synced_gpus",
    "_pad_token_tensor",
    "_eos_token_tensor",
    "_compiled_call",
    "_last_compile_config",
    "prefill_chunk_size",
    "is_assistant",
    # caches and their layers
    "Cache",
    "DynamicCache",
    "StaticCache",
    "QuantizedCache",
    "CacheLayerMixin",
    "DynamicLayer",
    "StaticLayer",
    "get_seq_length",
    "get_mask_sizes",
    "get_max_length",
    "get_max_cache_shape",
    "has_previous_state",
    "lazy_initialization",
    # attention and masks
    "ALL_ATTENTION_FUNCTIONS",
    "AttentionInterface",
    "AttentionMaskInterface",
    "sdpa_mask",
    "sdpa_attention_forward",
    "eager_attention_forward",
    "apply_rotary_pos_emb",
    "_attn_implementation",
    "_attn_implementation_internal",
    "set_attn_implementation",
    "_can_set_attn_implementation",
    "_supports_sdpa",
    "_supports_flash_attn",
    "_supports_flex_attn",
    "get_experts_implementation",
    # preparation of inputs
    "prepare_inputs_for_generation",
    "_prepare_cache_for_generation",
    "_update_model_kwargs_for_generation",
    "_supports_logits_to_keep",
    "model_kwargs",
}
OWN = {  # names of ours that read the same, by file
    ("transforms/static_cache.py", "StaticCache"),  # the transform's class
    ("machine/device/nvml.py", "_sample"),
    ("transforms/linears.py", "_sample"),
    ("runtime/attention_prompt.py", "_prefill"),  # the end of a name
    ("tune/selfcheck.py", "StaticCache"),
    ("runtime/own_texts.py", "logits_processor"),  # a caller's argument of generate, which is public
    ("validate/score.py", "logits_processor"),
}


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a syntax tree says, identifiers and whole strings, with its line; docstrings and hints apart."""
    for node in _without_hints(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name, line
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, line
            case ast.Constant(value=str(text)):
                yield text, line


def imports(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of everything that is imported from transformers at run time."""
    for node in _without_hints(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "transformers" and not node.level:
            yield from ((node.module or "", alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((a.name, "", node.lineno) for a in node.names if a.name.split(".")[0] == "transformers")


def _without_hints(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, annotations and docstrings."""
    yield tree
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns"):
            continue
        children = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, ast.AST)]
        for child in children:
            hint = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            if not hint and not text:
                yield from _without_hints(child)


def problems(path: str, source: str) -> list[str]:
    """What a file names that only the seam may name."""
    tree = ast.parse(source)
    said = [(name, line) for name, line in names(tree) if name in INSIDES and (path, name) not in OWN]
    taken = [
        (f"{module}.{name}", line)
        for module, name, line in imports(tree)
        if not (module == "transformers" and name in PUBLIC) and name not in MODULES.get(module, set())
    ]
    return [f"{path}:{line} names {name}" for name, line in said + taken]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_seam_names_what_is_inside_transformers(path: Path) -> None:
    assert problems(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("model(ids, past_key_values=cache)", "past_key_values"),
        ("given['cache_params'] = 1", "cache_params"),
        ("def forward(self, past_key_values=None): ...", "past_key_values"),
        ("out.past_key_values.layers", "past_key_values"),
        ("from transformers import DynamicCache", "transformers.DynamicCache"),
        ("from transformers.cache_utils import DynamicLayer as D", "transformers.cache_utils.DynamicLayer"),
        ("import transformers.masking_utils", "transformers.masking_utils."),
        ("getattr(model, '_sample')", "_sample"),
        ("class Layer(mixin.CacheLayerMixin): ...", "CacheLayerMixin"),
    ],
)
def test_what_the_seam_alone_may_name_is_found(source: str, found: str) -> None:
    assert problems("somewhere.py", source) == [f"somewhere.py:1 names {found}"]


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from transformers import DynamicCache",
        "def fill(prompt: DynamicCache) -> Cache: ...",
        '"""Fills past_key_values."""',
        "from transformers import PreTrainedModel",
    ],
)
def test_hints_docstrings_and_public_classes_may_be_anywhere(source: str) -> None:
    assert problems("somewhere.py", source) == []


@pytest.mark.parametrize(("path", "name"), sorted(OWN))
def test_every_exception_is_needed(path: str, name: str) -> None:
    assert name in {said for said, _ in names(ast.parse((ROOT / path).read_text()))}
