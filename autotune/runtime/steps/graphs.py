"""The decode step as CUDA graphs: one launch per token instead of one per operator.

A graph replays kernels on the same memory addresses with which it was captured. So each graph belongs to one slot cache
and has its own buffers for token and position. It reads a fixed number of slots: the first 256, 512, 1024, ... that
cover the filled slots, so that short contexts do not pay for empty slots. Graphs of one step share a memory pool. This
is safe because one thread at a time replays (`Device.replaying`), and a step's result is copied out before the next
step begins.

Graphs are captured when the transform is applied, never while a request is under way: a capture waits for the device,
releases memory, and drops the workspaces that other threads' operators may be about to use. What is not captured then
runs uncaptured: a batch larger than the buckets, more calls at once than caches are kept, a shape whose capture failed,
and what is beyond `captures.MOST_GRAPHS`. It is not captured later either: what was missing then, memory or a limit, is
missing later, and on a busy server no moment without requests may come.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch.torch_version import TorchVersion

from ...errors import DeviceError, TransformError, first_line
from ...machine import outside
from ..cache import slot_forward
from .step import DecodeSteps, Step
from .waiting import require_no_wait

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...machine.device import Device, Graph
    from ..cache.slots import SlotCache
    from .compiled import CompiledStep

log = logging.getLogger("autotune")

AGREEMENT = 0.02  # largest difference relative to the largest logit; replays run the same kernels, in BF16 at worst


@functools.cache
def most_failures(torch_version: str) -> int:
    """How many captures of a step may fail before no further shape is tried.

    Before torch 2.14 each of them keeps its memory for as long as the process lives (pytorch#190308).
    """
    return 3 if TorchVersion(torch_version) >= "2.14" else 1


def agree(given: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors of logits are the same except for rounding. A model may mask some logits with -inf."""
    largest = expected.masked_fill(~expected.isfinite(), 0).abs().max()
    return torch.allclose(given, expected, rtol=0, atol=AGREEMENT * float(largest), equal_nan=True)


@dataclass(eq=False)
class Captured:
    """One graph and its buffers.

    Args:
        token, position: [rows, K] int64, read by the graph.
        logits: [rows, V], or [rows, K, V] of a step of several tokens, written by the graph.
    """

    graph: Graph
    token: torch.Tensor
    position: torch.Tensor
    logits: torch.Tensor

    def replay(self, token: torch.Tensor, position: torch.Tensor, out: torch.Tensor) -> None:
        """Replay, within `Device.replaying`: token, position [B, K] in, logits out.

        Rows beyond B repeat the last one.
        """
        batch = token.shape[0]
        for buffer, given in ((self.token, token), (self.position, position)):
            buffer[:batch].copy_(given)
            if batch < buffer.shape[0]:
                buffer[batch:].copy_(given[-1:].expand(buffer.shape[0] - batch, -1))
        self.graph.replay()
        out.copy_(self.logits[:batch])


class GraphSteps(DecodeSteps):
    """Decode steps of one module as graphs, by slot cache and number of slots read.

    Args:
        module: the decode module.
        device: the device of its weights.
        rows: batch sizes that are captured; a smaller batch uses the next larger size.
        lengths: numbers of slots that are captured, ascending; the last is the number of all slots. Those without room
            for a token and a step after it are left out.
        inner: compiled steps to capture; None to capture the module itself.
        tokens: K, tokens of a sequence that a step takes at once; logits are [B, K, V] if K is more than one.

    Attributes:
        captures, replays: numbers of captures and replays so far.
        fallbacks: number of steps that ran uncaptured, by reason.
        failed: (rows, slots read) -> why the capture failed.
        subject: what is captured, in words.
    """

    subject = "the decode step"

    def __init__(
        self,
        module: PreTrainedModel,
        device: Device,
        rows: Sequence[int],
        lengths: Sequence[int],
        inner: CompiledStep | None = None,
        tokens: int = 1,
    ) -> None:
        self.module = module
        self.device = device
        self.inner = inner
        self.tokens = tokens
        self.rows = tuple(rows)
        self.lengths = tuple(read for read in lengths if read > tokens + 1) or tuple(lengths[-1:])
        self.captures = self.replays = 0
        self.fallbacks: Counter[str] = Counter()
        self._graphs: WeakKeyDictionary[SlotCache, dict[int, Captured]] = WeakKeyDictionary()
        self.failed: dict[tuple[int, int], str] = {}
        self._failed_captures = 0  # a shape whose graph ran out of memory at a replay is none
        self._pool: object = None

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(rows, slots read) of every graph."""
        return tuple({(cache.shape[0], read) for cache, graphs in self._graphs.items() for read in graphs})

    def __str__(self) -> str:
        uncaptured = self.fallbacks.total()
        why = f", {uncaptured} steps uncaptured ({'; '.join(self.fallbacks)})" if uncaptured else ""
        return f"{self.captures} graphs captured, {self.replays} steps replayed{why}"

    def reads(self, cache: SlotCache) -> tuple[int, ...]:
        """The numbers of slots that graphs over this cache read."""
        return tuple(self._graphs.get(cache, ()))

    def covering(self, tokens: int) -> int:
        """The number of slots to read for `tokens` tokens."""
        return next((read for read in self.lengths if read >= tokens), self.lengths[-1])

    @torch.no_grad()
    def look(self, cache: SlotCache) -> None:
        """Run the step once over a cache, uncompiled: what is compiled has no operators to look at.

        Raises:
            TransformError: the step waits for the device, so that no capture can succeed.
        """
        shape = cache.shape[0], self.width(cache)
        token, position = (torch.zeros(shape, dtype=torch.int64, device=cache.slot.device) for _ in range(2))
        require_no_wait(lambda: self._uncompiled(token, position, cache))

    @torch.no_grad()
    def prepare(self, cache: SlotCache, read: int) -> None:
        """Capture what reads `read` slots of a cache, unless it is captured or failed to be. No request is under way.

        Args:
            cache: filled with one token; rows of their own with one or two.

        Raises:
            TransformError: a replay gives other logits than the step itself.
        """
        fits = cache.longest + self.tokens < read  # one step more than the capture
        if read in self._graphs.get(cache, {}) or not fits or (captured := self._captured(cache, read)) is None:
            return
        cache.advance()  # slot, token and position differ from the capture, which froze every value of the host
        token = torch.ones(cache.batch, self.tokens, dtype=torch.int64, device=cache.slot.device)
        position = cache.slot[:, None].expand_as(token)
        self._require_same(captured, token, position, cache.first(read))
        cache.advance(-1)

    def _require_same(self, captured: Captured, token: torch.Tensor, position: torch.Tensor, part: SlotCache) -> None:
        expected = self._uncaptured(token, position, part)
        if not agree(self._replayed(captured, token, position), expected):
            raise TransformError(f"a replay of {self.subject} gives other logits than what was captured")

    def width(self, part: SlotCache) -> int:
        """Tokens of a sequence that a step over these slots takes at once."""
        return self.tokens

    def fitting(self, cache: SlotCache) -> Step:
        """The step, which serves every cache."""
        return self.step

    def step(self, token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
        """token, position [B, K] -> logits [B, V] or [B, K, V], a new tensor.

        Raises:
            DeviceError: the device failed permanently.
        """
        read = self.covering(cache.longest + self.tokens)
        if (captured := self._graphs.get(cache, {}).get(read)) is not None:
            try:
                return self._replayed(captured, token, position)
            except Exception as error:
                outside.pass_on(error)
                if self.device.failure(error) is None:
                    raise
                self._give_up(error, cache, read)
        self.fallbacks[self._refusal(cache, read)] += 1
        return self._uncaptured(token, position, cache.first(read))

    def forget(self) -> None:
        """Capture everything anew, because addresses have changed. No request is under way."""
        held = {cache: {*graphs, *self._failures(cache)} for cache, graphs in self._graphs.items()}

        def drop() -> None:
            self.device.synchronize()
            self._graphs.clear()
            self._pool = None  # a pool ends with its last graph

        self.device.owner.run(drop)
        self.failed.clear()
        self._failed_captures = 0
        for cache, reads in held.items():
            cache.slot.zero_()  # any slot that every graph reads; the next sequence begins with setting it
            for read in sorted(reads):
                self._captured(cache, read)

    def _failures(self, cache: SlotCache) -> set[int]:
        return {read for rows, read in self.failed if rows == cache.shape[0]}

    def _refusal(self, cache: SlotCache, read: int) -> str:
        rows = cache.shape[0]
        if rows not in self.rows and cache not in self._graphs:
            return f"a batch of {rows}, beyond the largest bucket of {self.rows[-1]}"
        if not cache.lasting:
            return "more generations at once than caches are kept"
        return self.failed.get((rows, read), f"no graph reads {read} slots")

    def _captured(self, cache: SlotCache, read: int) -> Captured | None:
        """Capture what reads `read` slots of a cache; None if that fails, or failed before."""
        if (cache.shape[0], read) in self.failed or self._failed_captures >= most_failures(torch.__version__):
            return None
        try:
            return self.device.owner.run(lambda: self._capture(cache, read))
        except DeviceError:
            raise
        except Exception as error:  # the model, a library or the driver may refuse a capture with any error
            outside.pass_on(error)
            self._failed_captures += 1
            self._give_up(error, cache, read)
            return None

    def _capture(self, cache: SlotCache, read: int) -> Captured:
        """Capture on the owner thread. The warm-ups write the next slots, which the first replay overwrites.

        Raises:
            TransformError: the step waits for the device; nothing was captured.
        """
        part = cache.first(read)
        shape = cache.shape[0], self.width(part)
        with torch.inference_mode(False), torch.no_grad():
            self.look(part)
            token, position = (torch.zeros(shape, dtype=torch.int64, device=cache.slot.device) for _ in range(2))
            step = self._inner(part)
            self._pool = self._pool or self.device.pool()
            graph, logits = self.device.capture(lambda: step(token, position, part), self._pool)
        captured = Captured(graph, token, position, logits)
        self._graphs.setdefault(cache, {})[read] = captured
        self.captures += 1
        return captured

    def _give_up(self, error: Exception, cache: SlotCache, read: int) -> None:
        """Record why a shape has no graph from now on.

        Raises:
            DeviceError: the error left the device unusable.
        """
        failure = self.device.failure(error)
        if failure == "dead":
            raise self.device.mark_dead(error) from error
        root: BaseException = error
        while root.__context__ is not None:  # ending a failed capture raises a second, less precise error
            root = root.__context__
        reason = first_line(root, typed=not isinstance(root, TransformError)) if failure is None else "out of memory"
        self.failed[cache.shape[0], read] = reason
        self._graphs.get(cache, {}).pop(read, None)
        self._pool = None  # later graphs do not share the pool of a failed capture
        if failure == "memory":
            self.device.trim()
        log.warning("no graph for %d sequences over %d slots, which run uncaptured: %s", cache.shape[0], read, reason)

    def _replayed(self, captured: Captured, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        logits = captured.logits
        out = torch.empty(token.shape[0], *logits.shape[1:], dtype=logits.dtype, device=logits.device)
        with self.device.replaying():
            captured.replay(token, position, out)
            self.replays += 1
        return out

    def _uncaptured(self, token: torch.Tensor, position: torch.Tensor, part: SlotCache) -> torch.Tensor:
        """Run the step that would be captured. Rows beyond the batch repeat the last one."""
        rows, batch = part.shape[0], token.shape[0]
        if batch < rows:
            token, position = (torch.cat([x, x[-1:].expand(rows - batch, -1)]) for x in (token, position))
        return self._inner(part)(token, position, part)[:batch]

    def _inner(self, part: SlotCache) -> Step:
        compiled = self.inner.fitting(part, self.tokens) if self.inner is not None else None
        return compiled or self._uncompiled

    def _uncompiled(self, token: torch.Tensor, position: torch.Tensor, part: SlotCache) -> torch.Tensor:
        step = slot_forward.step if self.tokens == 1 else slot_forward.steps
        return step(self.module, token, position, part)
