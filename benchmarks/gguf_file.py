"""The models of shapes.py as GGUF files in Q8_0, for llama.cpp: the same numbers, one tensor in memory at a time.

    python -m benchmarks.gguf_file 0.5B file.Q8_0.gguf

The tokenizer is a stand-in with names for all tokens: requests are token ids.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Form
from gguf import quants

from benchmarks import shapes
from benchmarks.shapes import SHAPES, TINY, ModelShape

ARCHITECTURES = {"Qwen2": gguf.MODEL_ARCH.QWEN2, "Llama": gguf.MODEL_ARCH.LLAMA}
VOCABULARY = ("\u010a", "a", "b", "ab")  # the line feed as byte-level BPE writes it; what the one merge is made of
MERGES = ("a b",)


def write(shape: ModelShape, path: Path, seed: int = 0) -> None:
    """Draw the weights of a shape and write them; matrices in Q8_0, vectors in FP32."""
    architecture = ARCHITECTURES[shape.architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    model = shapes.empty(shape)
    names = gguf.get_tensor_name_map(architecture, shape.fields["num_hidden_layers"])
    parameters = {
        name: (names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.shape)
        for name, tensor in model.named_parameters()
    }
    factors = rotary_factors(shape)
    describe(writer, shape)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, (stored, size) in parameters.items():
        if stored is None:
            raise ValueError(f"GGUF has no name for {name} in {gguf.MODEL_ARCH_NAMES[architecture]}")
        if len(size) == 1:
            writer.add_tensor_info(stored, size, np.dtype(np.float32), 4 * size[0])
        else:
            packed = quants.quant_shape_to_byte_shape(size, Form.Q8_0)
            writer.add_tensor_info(stored, packed, np.dtype(np.uint8), int(np.prod(packed)), raw_dtype=Form.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, (_, size) in parameters.items():
        parts = [packed_rows(part) for part in shapes.draw(shape, name, size, seed)]
        writer.write_tensor_data(ordered(shape, name, np.concatenate(parts)))
    writer.close()


def packed_rows(part: torch.Tensor) -> np.ndarray:
    """A matrix's rows in Q8_0, a vector's numbers as they are."""
    numbers = part.numpy()
    return numbers if numbers.ndim == 1 else quants.quantize(numbers, Form.Q8_0)


def ordered(shape: ModelShape, name: str, rows: np.ndarray) -> np.ndarray:
    """Rows in the order that llama.cpp expects.

    Its Llama rotates neighbouring rows of a head of queries or keys, transformers rotates row i and i + D / 2.
    """
    heads = {
        "q_proj": shape.fields["num_attention_heads"],
        "k_proj": shape.fields["num_key_value_heads"],
    }.get(name.split(".")[-2])
    if shape.architecture != "Llama" or heads is None:
        return rows
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rotary_factors(shape: ModelShape) -> np.ndarray | None:
    """[D / 2], what the plain rotary frequencies are divided by; None where they stay plain."""
    rope = shape.fields["rope_parameters"]
    if rope["rope_type"] == "default":
        return None
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled = LlamaRotaryEmbedding(config=shape.config()).inv_freq.double()
    pairs = torch.arange(len(scaled)).double()
    plain = rope["rope_theta"] ** (-pairs / len(scaled))
    return (plain / scaled).float().numpy()


def describe(writer: gguf.GGUFWriter, shape: ModelShape) -> None:
    """Everything but the tensors."""
    fields = shape.fields
    writer.add_name(shape.model)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(fields["vocab_size"])
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(fields["hidden_size"] // fields["num_attention_heads"])
    count = fields["vocab_size"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*VOCABULARY, *(f"<{number}>" for number in range(len(VOCABULARY), count))])
    writer.add_token_types([gguf.TokenType.NORMAL] * count)
    writer.add_token_merges(MERGES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[*SHAPES, *TINY])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    write((SHAPES | TINY)[given.shape], given.file)


if __name__ == "__main__":
    main()
