"""What a busy machine costs: decode of a recorded INT8 step and of transformers' own generate, quiet and under load.

    make bench-loaded
    python -m benchmarks.loaded --taken 2 --pinned

The model has random weights in the shape of SmolLM2-135M. The load is a process a core that computes without end, which
this benchmark starts, stops and lets go on. Every round times both runtimes with the load stopped and with it running,
in an order drawn anew, so that whatever else the machine does meets all of them. Ratios are within a round.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from autotune import transforms
from autotune.machine import busy
from autotune.profile.timing import time_request
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.transforms.threads import usable_cores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE: dict[str, Any] = {  # HuggingFaceTB/SmolLM2-135M, config.json
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PLAN = (("weight_only", {"bits": 8}), ("step_program", {"slots": 256}))
PROMPT, OURS, THEIRS = 32, "recorded INT8 step", "transformers"
SETTLE_S = 0.2  # after the load stops or goes on: the scheduler moves threads between cores
TAKES = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"

Timed = Callable[[], float]  # seconds per token of one request


@dataclass
class Round:
    """Milliseconds per token by (runtime, whether the load ran), and what others took of the quiet part."""

    ms: dict[tuple[str, bool], float] = field(default_factory=dict)
    elsewhere: float | None = None


class Load:
    """Processes that compute without end, stopped until they are let go.

    Args:
        taken: how many.
        pinned: whether each stays on a core of its own.
    """

    def __init__(self, taken: int, pinned: bool) -> None:
        self._processes = [subprocess.Popen([sys.executable, "-c", TAKES]) for _ in range(taken)]
        cpus = sorted(os.sched_getaffinity(0)) if pinned else []
        for process, cpu in zip(self._processes, cpus, strict=False):
            os.sched_setaffinity(process.pid, {cpu})
        self._tell(signal.SIGSTOP)

    @contextmanager
    def on(self, running: bool) -> Iterator[None]:
        if running:
            self._tell(signal.SIGCONT)
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self._tell(signal.SIGSTOP)

    def end(self) -> None:
        for process in self._processes:
            with suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def _tell(self, number: signal.Signals) -> None:
        for process in self._processes:
            process.send_signal(number)


@contextmanager
def competing(taken: int) -> Iterator[None]:
    """While so many processes compute without end."""
    load = Load(taken, pinned=False)
    try:
        with load.on(True):
            yield
    finally:
        load.end()


def model(layers: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).eval().requires_grad_(False)


def runtimes(original: PreTrainedModel, tokens: int) -> dict[str, Timed]:
    """Both, warm."""
    chain = [transforms.make(name, params, "decode") for name, params in PLAN]
    ids = torch.arange(3, 3 + PROMPT)[None]

    def timed(served: PreTrainedModel) -> Timed:
        time_request(served, ids, tokens)
        return lambda: time_request(served, ids, tokens).tpot_s

    return {OURS: timed(serving(Variant(original).with_transforms(chain))), THEIRS: timed(original)}


def measure(timed: dict[str, Timed], load: Load, rounds: int, say: Callable[[str], None]) -> list[Round]:
    draw, found = random.Random(0), list[Round]()
    for number in range(rounds):
        this = Round()
        for running in draw.sample([False, True], 2):
            with load.on(running):
                meter = busy.Meter()
                for name in draw.sample(sorted(timed), len(timed)):
                    this.ms[name, running] = 1e3 * timed[name]()
                if not running:
                    this.elsewhere = meter.elsewhere()
        found.append(this)
        say(f"round {number + 1} of {rounds}: " + ", ".join(f"{v:.1f}" for v in this.ms.values()))
    return found


def rows(found: Sequence[Round]) -> list[tuple[str, str, str, str]]:
    """Name, quiet, loaded, loaded / quiet within a round: medians with the lowest and the highest."""
    told: list[tuple[str, str, str, str]] = []
    for name in (OURS, THEIRS):
        quiet, loaded = ([r.ms[name, running] for r in found] for running in (False, True))
        told.append((f"{name}, ms", spread(quiet), spread(loaded), spread(ratios(loaded, quiet), "x")))
    gains = [ratios([r.ms[THEIRS, on] for r in found], [r.ms[OURS, on] for r in found]) for on in (False, True)]
    quiet_gain, loaded_gain = (spread(gain, "x") for gain in gains)
    return [*told, ("times as fast", quiet_gain, loaded_gain, "")]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=True)]


def spread(values: Sequence[float], unit: str = "") -> str:
    return f"{median(values):.2f}{unit} [{min(values):.2f}, {max(values):.2f}]"


def others(found: Sequence[Round]) -> str:
    """How quiet the quiet part was."""
    shares = [r.elsewhere for r in found if r.elsewhere is not None]
    return f"{median(shares):.0%} of the CPU time went elsewhere" if shares else "nobody says what others took"


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-loaded BENCH_ARGS=...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--taken", type=int, default=1, help="processes that compete, one a core")
    parser.add_argument("--pinned", action="store_true", help="each of them stays on its core")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--threads", type=int, default=None, help="default: torch's own number")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    if asked.threads:
        torch.set_num_threads(asked.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and nobody competes any more
    timed = runtimes(model(asked.layers), asked.tokens)
    load = Load(asked.taken, asked.pinned)
    try:
        found = measure(timed, load, asked.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    finally:
        load.end()
    kind = "pinned" if asked.pinned else "free to move"
    print(f"\n{torch.get_num_threads()} threads on {usable_cores()} cores; {asked.taken} competing, {kind}")
    print(f"{asked.rounds} rounds; median [lowest, highest]. While the load was stopped {others(found)}.\n")
    print("| | quiet | under load | under load / quiet |\n|---|---|---|---|")
    for row in rows(found):
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
