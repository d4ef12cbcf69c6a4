"""Tiny random models of real architectures, and a tiny real tokenizer: what the tests run on.

Two layers, hidden size 64, 256 tokens, float32, seeded. `initializer_range` is large, so that logits are decisive and a
wrong position, mask or cache changes tokens at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 256
CONTEXT = 256
PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
    **SPECIAL,
}
GROUPED = SIZES | {"num_key_value_heads": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}),
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": CONTEXT,
            "initializer_range": 0.3,
            **SPECIAL,
        },
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.3,
            **SPECIAL,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        GROUPED
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "tie_word_embeddings": False,  # tied, a random Gemma echoes its input
        },
    ),
    "mistral-window": ("MistralConfig", GROUPED | {"sliding_window": 8}),
    "mixtral": (
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "phi3": ("Phi3Config", GROUPED | {"original_max_position_embeddings": CONTEXT}),
    "mamba": (
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "state_size": 8,
            "num_hidden_layers": 2,
            "initializer_range": 0.3,
            **SPECIAL,
        },
    ),
}


def tiny(name: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random causal LM of architecture `name`, in evaluation mode, with greedy defaults."""
    config_class, sizes = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**(sizes | changes))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    model.generation_config.update(do_sample=False, **SPECIAL)
    return model


def tiny_t5() -> PreTrainedModel:
    """Encoder-decoder."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        decoder_start_token_id=PAD,  # type: ignore[call-arg]
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def tiny_bert() -> PreTrainedModel:
    """Encoder only."""
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    return transformers.BertForMaskedLM(config).eval()


def plain_module() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(VOCABULARY, 16), torch.nn.Linear(16, VOCABULARY))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A real byte-level BPE tokenizer without merges, one token a byte, that fits the tiny models' vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCABULARY - len(special) - 1]
    vocabulary = {token: i for i, token in enumerate([*special, "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def token_prompts(count: int = 4, length: int = 12, seed: int = 1) -> list[list[int]]:
    """`count` random prompts of `length` token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(EOS + 2, VOCABULARY, (count, length), generator=generator)  # [count, length]
    return ids.tolist()


def left_padded(lengths: tuple[int, ...] = (9, 5, 12), seed: int = 2) -> dict[str, torch.Tensor]:
    """A left-padded batch: input_ids and attention_mask, both [B, P]."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(EOS + 2, VOCABULARY, (length,), generator=generator)
        mask[row, width - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


ONE_QUESTION = """
name = "quick"
description = "One question, in seconds"
objective = "latency"
tier = "strict"
budget_s = 10

[[steps]]
name = "threads"
when = { phase = "decode" }
choices = [{ transform = "threads", phase = "decode", count = 1 }]
"""  # a policy
