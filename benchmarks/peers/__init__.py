"""The runtimes that are compared: one small file for each library, and a row here for each way of using it.

A module of this package has `create(setup, **options) -> Runtime`; where files have to be made or something has to be
found out first, also `prepare(setup, **options)`, which runs untimed in a process of its own. Whatever either raises
makes the runtime a missing one, with that reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from benchmarks.measures import Timing

if TYPE_CHECKING:
    import numpy as np


Home = Literal["torch", "other", "vllm"]


@dataclass(frozen=True)
class Setup:
    """What every runtime is given.

    Args:
        checkpoint: directory of the model as transformers saves it, FP32.
        gguf: the GGUF file it came from.
        files: directory for files that are made once (other quantisations).
        threads: CPU threads to compute with.
        longest: tokens of the longest request, prompt and answer.
        workload: token ids of prompts that a runtime may tune for.
        new_tokens: that a prompt is answered with.
        batch_sizes: sequences sent together, as far as it may tune for them.
    """

    checkpoint: str
    gguf: str
    files: str
    threads: int
    longest: int
    workload: Sequence[Sequence[int]] = ()
    new_tokens: int = 32
    batch_sizes: Sequence[int] = (1,)


@dataclass(frozen=True)
class Weights:
    """Bytes of weights: `stored` in memory, `read` for each token at one sequence. None where unknown."""

    stored: int | None = None
    read: int | None = None


class Runtime(Protocol):
    """A loaded model. Decoding is greedy, an end-of-sequence token ends nothing, nothing is kept between requests."""

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Timing:
        """Answer prompts of equal length together with exactly `new_tokens` each."""
        ...

    def logits(self, ids: Sequence[int]) -> Mapping[str, np.ndarray]:
        """Teacher-forced logits of a text by the path that computed them; none where the runtime gives none.

        Each is [rows, V] float32; the last row predicts the text's last token, the one before it the token before.
        """
        ...

    def weights(self) -> Weights: ...

    def notes(self) -> list[str]:
        """What a reader of the table should know."""
        ...


class ServingRuntime(Runtime, Protocol):
    """A runtime that answers requests that join and leave at any time."""

    def serve(self, asked: Sequence[Sequence[Sequence[int]]], new_tokens: int) -> list[float]:
        """When each answer of `new_tokens` was whole, in seconds from the start.

        Args:
            asked: each caller's prompts. It asks for one answer after the other.
        """
        ...


@dataclass(frozen=True)
class Peer:
    """One row of the comparison.

    Args:
        name: what --only takes.
        label: what the table shows.
        module: where `create` is.
        options: its keyword arguments.
        home: the environment that has it: autotune's ("torch"), that of runtimes without torch ("other"), or "vllm".
        rivals: names of the rows that it is compared with one to one.
    """

    name: str
    label: str
    module: str
    options: Mapping[str, Any] = field(default_factory=dict)
    home: Home = "torch"
    rivals: tuple[str, ...] = ()


REFERENCE = "eager"
VLLM = "vllm"
VLLM_PYTHON = ".venv-vllm/bin/python"  # as the Makefile makes it


def _autotune(tier: str, policy: str, *rivals: str) -> Peer:
    return Peer(f"autotune-{tier}", f"autotune, {tier}", "tuned", {"policy": policy}, rivals=rivals)


def _fixed(
    name: str, form: str, weights: str, params: Mapping[str, Any], prefill: str, *rivals: str, rounds: bool = False
) -> Peer:
    options = {"weights": weights, "params": params, "prefill": prefill, "rounds": rounds}
    label = f"autotune's kernels, {form}, no search"
    return Peer(f"autotune-{name}", label, "fixed", options, rivals=(REFERENCE, *rivals))


def _llama(file_type: str) -> Peer:
    return Peer(f"llama.cpp-{file_type.lower()}", f"llama.cpp {file_type}", "llama", {"file_type": file_type}, "other")


PEERS = (
    Peer(REFERENCE, "transformers eager, FP32", "hugging_face"),
    Peer("compiled", "transformers, static cache + compile", "compiled"),
    Peer("torchao-int8", "torchao INT8 weight-only + compile", "compiled", {"int8": True}),
    Peer("bitsandbytes-nf4", "bitsandbytes NF4", "bitsandbytes_"),
    _llama("F16"),
    _llama("Q8_0"),
    _llama("Q4_1"),
    Peer("openvino-q8_0", "OpenVINO GenAI, Q8_0", "openvino_", home="other"),
    Peer("openvino-q8_0-f32", "OpenVINO GenAI, Q8_0, FP32 hint", "openvino_", {"precision": "f32"}, "other"),
    Peer(VLLM, "vLLM, FP32", "vllm_", {"dtype": "float32"}, "vllm"),
    _fixed("float16", "F16", "weight_storage", {}, "linear_bf16x3", "llama.cpp-f16"),
    _fixed("int8", "INT8", "weight_only", {"bits": 8}, "linear_bf16", "llama.cpp-q8_0"),
    _fixed(
        *("int8-rounded", "INT8, 8-bit activations", "weight_only", {"bits": 8}, "packed_prefill"),
        *("llama.cpp-q8_0", "openvino-q8_0", "openvino-q8_0-f32"),
        rounds=True,
    ),
    _autotune("lossless", "lossless", REFERENCE, "llama.cpp-f16"),
    _autotune("strict", "balanced", REFERENCE, "llama.cpp-q8_0", "openvino-q8_0", "openvino-q8_0-f32"),
    _autotune("relaxed", "latency", REFERENCE, "llama.cpp-q4_1"),
)


def chosen(names: Sequence[str] = ()) -> tuple[Peer, ...]:
    """The peers of these names, in the table's order; all of them for none. The reference is always among them.

    Raises:
        KeyError: there is no such peer.
    """
    known = {peer.name for peer in PEERS}
    if unknown := sorted(set(names) - known):
        raise KeyError(f"no runtime is called {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    return tuple(peer for peer in PEERS if not names or peer.name in names or peer.name == REFERENCE)
