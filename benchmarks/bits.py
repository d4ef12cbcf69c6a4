"""What weights of 4, 6 and 8 bits cost a model, and the bytes that a token reads.

    python -m benchmarks.bits MODEL

For each form of `weight_only`, with lm_head in the same or a wider one, it prints mean KL divergence from the model's
own weights and how often the same token is on top, on text that nothing was tuned on. Products are in FP32, so that
only the weights differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from autotune.runtime import kernels
from autotune.runtime.variant import Variant
from autotune.transforms.weight_only import COMPENSATED, WeightOnly
from benchmarks.quality import TEXT_TOKENS, diverge, paragraphs, summary

HEAD = "lm_head"
FORMS = {
    ("4", "4"): WeightOnly("decode", bits=4),
    ("4", "6"): WeightOnly("decode", bits=4, wide=HEAD, wide_as="int6"),
    ("4", "8"): WeightOnly("decode", bits=4, wide=HEAD),
    ("4, compensated", "8"): WeightOnly("decode", bits=4, wide=HEAD, rounding=COMPENSATED),
    ("6", "6"): WeightOnly("decode", bits=6),
    ("6", "8"): WeightOnly("decode", bits=6, wide=HEAD),
    ("8", "8"): WeightOnly("decode", bits=8),
}  # bits, and those of lm_head -> weights


def logits(model: nn.Module, texts: Sequence[Sequence[int]]) -> Iterator[np.ndarray]:
    """Logits [T - 1, V] of each text; each row predicts the token after it."""
    with torch.inference_mode():
        for ids in texts:
            yield model(torch.tensor([ids])).logits[0, :-1].numpy()


def round_weights(variant: Variant, form: WeightOnly) -> tuple[nn.Module, int]:
    """A twin whose layers have the rounded weights in FP32, and the bytes that these take packed."""
    twin, packed_bytes = variant.with_transform(form).modules["decode"], 0
    packed = {name: each for name, each in twin.named_modules() if isinstance(each, kernels.PackedLinear)}
    for name, layer in packed.items():
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.dequantize(), requires_grad=False)
        if layer.bias is not None:
            plain.bias = nn.Parameter(layer.bias, requires_grad=False)
        twin.set_submodule(name, plain)
        packed_bytes += layer.weight_bytes
    return twin, packed_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a folder or a name on the hub")
    name = parser.parse_args(arguments).model
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    texts = [tokenizer(text).input_ids[:TEXT_TOKENS] for text in paragraphs()]
    right = list(logits(model, texts))
    original = Variant(model)
    print("| bits | of lm_head | MB a token | mean KLD | same top |\n|---|---|---|---|---|")
    for (bits, head_bits), form in FORMS.items():
        rounded, packed_bytes = round_weights(original, form)
        found = zip(right, logits(rounded, texts), texts, strict=True)
        quality = summary([diverge(reference, rows, ids) for reference, rows, ids in found])
        shares = f"{quality.mean_kld:.2g} | {quality.same_top:.1%}"
        print(f"| {bits} | {head_bits} | {packed_bytes / 1e6:.0f} | {shares} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
