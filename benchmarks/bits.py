"""What weights of 4, 6 and 8 bits cost a model, and the bytes that a token reads.

    python -m benchmarks.bits MODEL

For each number of bits, in all linear layers or in all but lm_head, it prints mean KL divergence from the model's own
weights and how often the same token is on top, on text that nothing was tuned on. Products are in FP32, so that only
the weights differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.model import linear_layers
from autotune.runtime import kernels
from benchmarks.quality import TEXT_TOKENS, diverge, paragraphs, summary

KINDS: Mapping[int, type[kernels.QuantisedLinear]] = {
    4: kernels.Int4Linear,
    6: kernels.Int6Linear,
    8: kernels.Int8Linear,
}
MIXES = [(bits, head) for bits in KINDS for head in KINDS if bits <= head]  # bits, and those of lm_head


def logits(model: nn.Module, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits [T - 1, V] of each text; each row predicts the token after it."""
    with torch.inference_mode():
        for ids in texts:
            yield model(torch.tensor([ids])).logits[0, :-1].numpy()


def quantise(layers: Mapping[str, nn.Linear], weights: Mapping[str, torch.Tensor], bits: int, head_bits: int) -> int:
    """Round the layers' weights in place. Returns the bytes that they take packed."""
    packed_bytes = 0
    for name, layer in layers.items():
        packed = KINDS[head_bits if name == "lm_head" else bits].from_weight(weights[name])
        packed_bytes += packed.weight_bytes
        layer.weight = nn.Parameter(packed.dequantize(), requires_grad=False)
    return packed_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a name on the hub")
    name = parser.parse_args(arguments).model
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    texts = [tokenizer(text).input_ids[:TEXT_TOKENS] for text in paragraphs()]
    layers = linear_layers.linears(model)
    weights = {layer: linear.weight.detach() for layer, linear in layers.items()}
    right = list(logits(model, texts))
    print("| bits | of lm_head | MB a token | mean KLD | same top |\n|---|---|---|---|---|")
    for bits, head_bits in MIXES:
        packed_bytes = quantise(layers, weights, bits, head_bits)
        found = zip(right, logits(model, texts), texts, strict=True)
        quality = summary([diverge(reference, rows, ids) for reference, rows, ids in found])
        shares = f"{quality.mean_kld:.2g} | {quality.same_top:.1%}"
        print(f"| {bits} | {head_bits} | {packed_bytes / 1e6:.0f} | {shares} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
