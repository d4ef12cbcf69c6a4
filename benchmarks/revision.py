"""What asking costs whether a model is still what it was when it was tuned (autotune/model/revision.py), at every call.

    python -m benchmarks.revision

Builds a random Llama of SmolLM2-135M's shape. Prints the median and the spread of 500 questions, in milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles

from transformers import LlamaConfig, LlamaForCausalLM

from autotune.model.revision import Revision

ASKED = 500  # times


def seconds(work: Callable[[], object], times: int = 1) -> list[float]:
    """How long `work` took, each time."""
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return took


def main() -> None:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    (made,) = seconds(lambda: Revision(model))
    revision = Revision(model)
    low, median, high = quantiles(seconds(revision.changed, ASKED), n=4)
    (closer,) = seconds(revision.look_closer)
    print(f"modules: {sum(1 for _ in model.modules())}")
    print(f"asked at every call: {1e3 * median:.2f} ms (quartiles {1e3 * low:.2f} and {1e3 * high:.2f})")
    print(f"asked when idle: {1e3 * closer:.1f} ms; made once, when tuning ends: {1e3 * made:.0f} ms")


if __name__ == "__main__":
    main()
