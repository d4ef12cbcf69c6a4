"""Models of published shapes with random weights, made from a seed: what tuning costs at real sizes.

How realistic they are:

* Shapes, attention, rotary embeddings and ties are those of the public configurations. Operators, bytes and FLOPs are
  those of a trained model.
* Some channels of the residual stream are OUTLIER times as large as the others in every layer, and every matrix reads a
  few of its input channels through weights OUTLIER times as large. Trained models from about 1e9 parameters on have
  such channels, the same ones in all layers and up to 20 times as large as the others (Dettmers, Lewis, Belkada and
  Zettlemoyer, "LLM.int8(): 8-bit matrix multiplication for transformers at scale", NeurIPS 2022, arXiv 2208.07339).
  They are what makes coarse quantisation fail, and here it fails, too.
* Logits have a standard deviation of LOGIT_STD: over 150 000 tokens that leaves 4 to 5 nats of entropy, where trained
  models have 2 to 3 on text.
* Blocks add half as much to the residual stream as the embedding brings. Were it more, a random network would amplify
  rounding errors as no trained one does. As it is (eight layers of 0.5B, a vocabulary of 32 000), 8-bit weights in
  groups of 32 cost a mean KL divergence of 0.0003 nat, 4-bit ones 0.05 and BF16 arithmetic 0.0007. Trained models read
  0.0004 to 0.0014, 0.013 to 0.031 and 0.00003 (autotune/validate/tiers.py).
* Nothing was learnt. What the quality gate says about a format holds for such numbers alone, and answers mean nothing.

The numbers of a tensor depend on its name and the seed alone. BF16 weights are the FP32 ones, rounded.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OUTLIER = 4.0  # times as large as usual: outlier channels of the residual stream, and weights that read such channels
SPACING = 256  # one channel in so many is an outlier
FEWEST = 2  # outlier channels of a matrix, however small
EMBEDDING_STD = 0.02  # transformers' default
LOGIT_STD = 4.0
QUERY_GAIN = 1.5  # of queries and keys: attention that prefers some tokens clearly
MLP_GAIN = 2.0  # of what a feed-forward block adds: its gates halve their inputs
BRANCHES = 0.5  # size of what all blocks add together, in units of the embedding that the residual stream begins with
BIAS_STD = 0.5  # of queries and keys; values' biases are the same for every token and add up over the layers
VALUE_BIAS_STD = 0.05
ROWS = 4096  # drawn at a time, to bound the memory for FP32 numbers


@dataclass(frozen=True)
class ModelShape:
    """The shape of a published model.

    Args:
        name: as --only takes it: "0.5B".
        model: whose shape it is.
        architecture: transformers' prefix of the classes: "Qwen2".
        fields: of the configuration.
    """

    name: str
    model: str
    architecture: str
    fields: Mapping[str, Any]

    def config(self) -> Any:
        """The configuration, without special tokens: nothing ends an answer early."""
        special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return getattr(transformers, f"{self.architecture}Config")(**self.fields, **special)


def _decoder(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **fields: Any
) -> dict[str, Any]:
    return fields | {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": True,
    }


def _qwen(*sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return _decoder(*sizes, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_parameters=rope)


def _llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = hidden, intermediate, layers, heads, kv_heads, vocabulary
    fields: dict[str, Any] = {"head_dim": hidden // heads, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5}
    return _decoder(*sizes, **fields, rope_parameters=rope)


def _smollm(*sizes: int) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    return _decoder(*sizes, max_position_embeddings=8192, rms_norm_eps=1e-5, rope_parameters=rope)


# config.json of HuggingFaceTB/SmolLM2-360M, Qwen/Qwen2.5-0.5B, meta-llama/Llama-3.2-1B and Qwen/Qwen2.5-3B
SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("0.36B", "SmolLM2-360M", "Llama", _smollm(960, 2560, 32, 15, 5, 49152)),
        ModelShape("0.5B", "Qwen2.5-0.5B", "Qwen2", _qwen(896, 4864, 24, 14, 2, 151936)),
        ModelShape("1B", "Llama-3.2-1B", "Llama", _llama(2048, 8192, 16, 32, 8, 128256)),
        ModelShape("3B", "Qwen2.5-3B", "Qwen2", _qwen(2048, 11008, 36, 16, 2, 151936)),
    )
}
TINY = {  # for tests
    shape.name: shape
    for shape in (
        ModelShape("tiny", "a tiny Qwen2.5", "Qwen2", _qwen(64, 128, 2, 4, 2, 512)),
        ModelShape("tiny-llama", "a tiny Llama 3.2", "Llama", _llama(64, 128, 2, 4, 2, 512)),
    )
}


def build(shape: ModelShape, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The model, in evaluation mode; its weights are drawn in `dtype`, ROWS rows at a time."""
    config = shape.config()
    model = empty(shape, dtype).to_empty(device="cpu")
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)  # its frequencies are computed, not drawn
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            first = 0
            for rows in draw(shape, name, parameter.shape, seed):
                parameter[first : first + len(rows)] = rows
                first += len(rows)
    model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.eval().requires_grad_(False)


def empty(shape: ModelShape, dtype: torch.dtype = torch.float32) -> Any:
    """The model without memory for its weights."""
    cls = getattr(transformers, f"{shape.architecture}ForCausalLM")
    with torch.device("meta"):
        return cls._from_config(shape.config(), dtype=dtype)


def draw(shape: ModelShape, name: str, size: torch.Size, seed: int = 0) -> Iterator[torch.Tensor]:
    """The FP32 numbers of a parameter, ROWS rows after ROWS rows.

    Args:
        name: of the parameter, as the model has it.
        size: [N] or [N, K].
    """
    dice = torch.Generator().manual_seed(zlib.crc32(f"{seed} {shape.model} {name}".encode()))
    kind, hidden = name.rpartition(".")[0].rpartition(".")[2], int(shape.fields["hidden_size"])
    columns = torch.ones(size[-1]) if len(size) == 2 else None
    if columns is not None:
        columns[outliers(size[-1])] = OUTLIER
    for first in range(0, size[0], ROWS):
        part = torch.randn(min(ROWS, size[0] - first), *size[1:], generator=dice)
        if name.endswith(".bias"):
            yield part * (VALUE_BIAS_STD if kind == "v_proj" else BIAS_STD)
        elif columns is None:
            yield part.sign() * _final_gain(hidden) if name == "model.norm.weight" else 1 + 0.1 * part
        else:
            part *= columns * _std(shape, kind, columns)
            if kind in ("o_proj", "down_proj"):  # they write to the residual stream
                written = torch.ones(size[0])
                written[outliers(size[0])] = OUTLIER
                part *= written[first : first + ROWS, None]
            yield part


def outliers(channels: int) -> torch.Tensor:
    """Which of so many channels are outliers, spread evenly."""
    count = max(FEWEST, channels // SPACING)
    return torch.arange(count) * channels // count + channels // (2 * count)


def _std(shape: ModelShape, kind: str, columns: torch.Tensor) -> float:
    """Standard deviation of weights that are no outliers, such that outputs are about 1 within a block."""
    if kind == "embed_tokens":
        return EMBEDDING_STD
    if kind in ("o_proj", "down_proj"):
        added = BRANCHES * EMBEDDING_STD / (2 * shape.fields["num_hidden_layers"]) ** 0.5
        return added * (MLP_GAIN if kind == "down_proj" else 1.0) / float(columns.square().sum().sqrt())
    gain = QUERY_GAIN if kind in ("q_proj", "k_proj") else 1.0
    return gain / _normed_length(shape.fields["hidden_size"])


def _normed_length(hidden: int) -> float:
    """Length of a normed vector of the residual stream, every channel weighed as a matrix weighs it.

    Root mean squares are 1 after the norm; an outlier counts OUTLIER times as much as others in the stream, and again
    in the weights that read it.
    """
    count = len(outliers(hidden))
    others = hidden - count
    mean_square = (others + count * OUTLIER**2) / hidden
    return float(((others + count * OUTLIER**4) / mean_square) ** 0.5)


def _final_gain(hidden: int) -> float:
    """Of the last norm, so that logits over the tied embedding have a standard deviation of LOGIT_STD.

    Its signs are drawn: with equal ones, the token that was read would be the likeliest by far.
    """
    return LOGIT_STD / (EMBEDDING_STD * _normed_length(hidden))
