"""What a real GPU does, as far as `FakeCuda` does it, each with its source. Tests break each of them.

Breaking one raises `Misuse` where a real device gives wrong numbers, crashes later, or works until it is busy, and
torch's own error where torch has one. What operators refuse is in `refusals.py`, in the same form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Misuse(RuntimeError):
    """Something that a real device punishes."""


class Rule(NamedTuple):
    """A rule and where it is written.

    Args:
        says: what the device does.
        source: the documentation, source file or issue that says so.
    """

    says: str
    source: str


RULES: Mapping[str, Rule] = {
    "operators": Rule(
        "a graph replays operators, not Python: what the host decided is frozen",
        "CUDA programming guide, CUDA graphs",
    ),
    "buffers": Rule(
        "a graph reads and writes the buffers it was captured with: none is freed or resized",
        "torch.cuda.CUDAGraph: a replay runs on the same virtual addresses",
    ),
    "result": Rule(
        "the result of a replay is in one buffer, overwritten by the next",
        "torch.cuda.CUDAGraph",
    ),
    "stream": Rule(
        "captures and replays happen inside the device's own stream, into which one thread queues at a time",
        "CUDA driver API: graph objects are not thread-safe; torch.cuda.graph captures one stream",
    ),
    "lazy": Rule(
        "what is queued into the device's stream runs when somebody waits for it: its results are garbage before, and "
        "it reads what its inputs hold by then",
        "CUDA programming guide, asynchronous concurrent execution",
    ),
    "fetch": Rule(
        "a copy to pinned memory is garbage before it was waited for",
        "torch.Tensor.copy_, non_blocking=True; CUDA programming guide, memory copies",
    ),
    "before": Rule(
        "a replay waits for what the caller queued before (mark, wait)",
        "CUDA programming guide, streams: work of two streams is in no order without an event",
    ),
    "after": Rule(
        "what the caller queues after a replay waits for it (mark, wait)",
        "CUDA programming guide, streams",
    ),
    "first": Rule(
        "the first run of an operator loads its kernels and sets up its library, which a capture does not allow",
        "CUDA programming guide, lazy loading; torch's notes on CUDA graphs: warm up before a capture",
    ),
    "synchronize": Rule(
        "nothing waits for the device during a capture",
        "cudaErrorStreamCaptureUnsupported",
    ),
    "values": Rule(
        "an operator that reads a value back from the device, or a size that depends on values, waits; see `WAITS`",
        "c10/cuda/CUDAFunctions.h, memcpy_and_sync; the file of each operator in `WAITS`",
    ),
    "host": Rule(
        "a copy between the device and pageable host memory waits: .cpu(), .tolist(), .numpy(), torch.tensor(device=)",
        "CUDA driver API, API synchronization behavior",
    ),
    "release": Rule(
        "no thread releases memory during a capture",
        "c10/cuda/CUDACachingAllocator.cpp, emptyCache; pytorch#180395",
    ),
    "workspace": Rule(
        "libraries keep one workspace for a stream; a capture uses it unless it was dropped, and the end of any graph "
        "frees it",
        "pytorch#193402; ATen/cuda/CUDAGraph.cpp, CUDAGraph::reset",
    ),
    "pool": Rule(
        "graphs of one pool share its memory, which nobody else has until the last of them ends",
        "torch.cuda.graph_pool_handle; c10/cuda/CUDACachingAllocator.cpp, PrivatePool",
    ),
    "leak": Rule(
        "a failed capture keeps the memory of its pool as long as the process lives",
        "pytorch#190308 (torch before 2.14)",
    ),
    "memory": Rule(
        "a capture whose pool cannot grow raises OutOfMemoryError",
        "c10/cuda/CUDACachingAllocator.cpp, malloc",
    ),
}
