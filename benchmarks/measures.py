"""What is measured: requests of fixed shapes, and the figures that are read off their timings. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Extent = Literal["quick", "usual", "long"]
SHAPES: dict[Extent, tuple[tuple[int, ...], ...]] = {  # prompts' tokens, contexts' tokens, sequences at once
    "quick": ((32, 512), (64,), (1, 4)),
    "usual": ((32, 512, 1500), (64, 1024), (1, 4, 16)),
    "long": ((8, 32, 128, 512, 2048, 8000), (64, 1024, 8000), (1, 4, 16, 32)),
}
STEPS = 24  # decoding steps that a time per token is an average of
SPREAD = 7919  # a prime: prompts of neighbouring numbers begin far apart in the text


@dataclass(frozen=True)
class Shape:
    """One kind of request.

    Args:
        batch: sequences sent together.
        prompt_tokens: tokens of each prompt.
        new_tokens: tokens generated per sequence, whatever they are.
        repeats: requests timed at each visit, each with prompts of its own.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int = 1


@dataclass(frozen=True)
class Timing:
    """What one request took.

    Args:
        first_s: from the call to the first token; None where a batch hides it.
        total_s: from the call to the last token.
    """

    first_s: float | None
    total_s: float


@dataclass(frozen=True)
class Metric:
    """One figure.

    Args:
        name: its key in the JSON file.
        title: its column.
        unit: "ms" or "tokens/s"; times are better when smaller, rates when larger.
        shape: the request it is measured with.
        read: the figure of one timing, in `unit`.
    """

    name: str
    title: str
    unit: str
    shape: Shape
    read: Callable[[Timing, Shape], float]

    @property
    def smaller_is_better(self) -> bool:
        return self.unit == "ms"


def ttft_ms(timing: Timing, shape: Shape) -> float:
    """Time to the first token."""
    return 1e3 * (timing.total_s if timing.first_s is None else timing.first_s)


def tpot_ms(timing: Timing, shape: Shape) -> float:
    """Time per token after the first."""
    assert timing.first_s is not None
    return 1e3 * (timing.total_s - timing.first_s) / (shape.new_tokens - 1)


def tokens_per_s(timing: Timing, shape: Shape) -> float:
    """New tokens of all sequences over the time of the whole request, its prompts included."""
    return shape.batch * shape.new_tokens / timing.total_s


def steady(ended: Sequence[float], callers: int, each: int, new_tokens: int) -> float:
    """New tokens per second of all callers, prompts included, while each has a request under way.

    The time begins when as many answers are whole as there are callers, and ends `each` times as many answers later.
    If each asks for two answers more than `each`, none has left by then unless it is an answer ahead of the others.

    Args:
        ended: when each answer was whole, in seconds.
        each: answers of each caller that are counted.
        new_tokens: of each answer.
    """
    times, counted = sorted(ended), callers * each
    return counted * new_tokens / (times[callers + counted - 1] - times[callers - 1])


def metrics(extent: Extent = "usual") -> tuple[Metric, ...]:
    """The figures of a run: the few of a quick one, the usual ones, or those of all lengths up to 8000 tokens."""
    steps = STEPS // 2 if extent == "quick" else STEPS
    prompts, contexts, batches = SHAPES[extent]
    return (
        *(Metric(f"ttft_{n}", f"TTFT {n}", "ms", Shape(1, n, 1, 3 if n < 100 else 1), ttft_ms) for n in prompts),
        *(Metric(f"tpot_{n}", f"TPOT at {n}", "ms", Shape(1, n, steps + 1), tpot_ms) for n in contexts),
        *(
            Metric(f"rate_{b}", f"{b} sequence{'s' * (b > 1)}", "tokens/s", Shape(b, 64, steps + 1), tokens_per_s)
            for b in batches
        ),
    )


def shapes(chosen: Sequence[Metric]) -> tuple[Shape, ...]:
    """The distinct requests that `chosen` need, each sent once a round."""
    return tuple(dict.fromkeys(metric.shape for metric in chosen))


def prompt(text: Sequence[int], number: int, tokens: int) -> list[int]:
    """The `number`-th prompt: `tokens` ids of the text from a place of its own on, beginning again where it ends.

    No two begin alike, so that a runtime that keeps the cache of a prefix finds none.
    """
    start = number * SPREAD % len(text)
    return [text[(start + i) % len(text)] for i in range(tokens)]
