"""What `autotune plan-capacity` expects of a replica against what it does, at three loads: `make bench-capacity`.

SmolLM2-135M-Instruct is tuned with the policy `throughput`, which measures callers with the prompts of tuning. Then 1,
4 and 16 callers ask for answers of another length after prompts of another length, without a pause, in rounds.

A shared machine changes its pace within minutes. So before each measurement a lonely caller asks what tuning had timed,
and what is expected is printed twice: as the report says it, and with times per prompt and step as they are at this
minute. The exit code is of the latter.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import autotune
from autotune.cli import demo
from autotune.model.load import load
from autotune.report.capacity import ReplicaCosts, Usage, costs_of, simulate
from autotune.workload import built_in

CALLERS = (1, 4, 16)
USAGE = Usage(prompt_tokens=192, new_tokens=48)
ROUNDS = 3
REQUESTS = 4  # of each caller in a round; the first is not counted
LONELY, LONELY_TOKENS = 5, 24
ALLOWED = 0.2


def measure(model: Any, draw: Callable[[int], list[int]], callers: int) -> tuple[float, float]:
    """Tokens per second of so many callers, and the median time per further token."""
    per_token, counted, began = list[float](), 0, list[float]()
    barrier, lock = threading.Barrier(callers, lambda: began.append(time.perf_counter())), threading.Lock()

    def call(own: list[list[int]]) -> None:
        nonlocal counted
        for turn, prompt in enumerate(own):
            if turn == 1:
                barrier.wait()
            _, tpot_s = timed(model, prompt, USAGE.new_tokens)
            if turn:
                with lock:
                    counted += USAGE.new_tokens
                    per_token.append(tpot_s)

    owned = [[draw(USAGE.prompt_tokens) for _ in range(REQUESTS)] for _ in range(callers)]
    threads = [threading.Thread(target=call, args=(own,)) for own in owned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counted / (time.perf_counter() - began[0]), median(per_token)


def pace(model: Any, costs: ReplicaCosts, draw: Callable[[int], list[int]]) -> ReplicaCosts:
    """The costs at this minute's pace, by requests of a lonely caller as tuning timed them."""
    tokens, read_s = list(costs.reads_s.items())[-1]
    asked = [timed(model, draw(tokens), LONELY_TOKENS) for _ in range(LONELY)]
    ttft_s, tpot_s = (median(each) for each in zip(*asked, strict=True))
    return costs.sped_up(read_s / ttft_s, costs.steps_s[1] / tpot_s)


def timed(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token of an answer, and for each further one."""
    began = time.perf_counter()
    times = [time.perf_counter() for _ in model.autotune.submit(prompt, max_new_tokens=new_tokens, do_sample=False)]
    return times[0] - began, (times[-1] - times[0]) / (len(times) - 1)


def main() -> int:
    model, tokenizer = load(str(demo.model_file()))
    assert tokenizer is not None
    # No token ends an answer. A least length would do so with a processor, which takes a tenth of a token's time.
    model.generation_config.eos_token_id = None
    chats = built_in.chats(tokenizer)
    wrapped: Any = autotune.wrap(
        model, tokenizer=tokenizer, policy="throughput", workload=chats, when="blocking", cache=False, progress=print
    )
    costs = costs_of(wrapped.autotune.report().record)
    for name, found_s in (("reads", costs.reads_s), ("steps", costs.steps_s)):
        print(f"{name}, ms:", {n: round(1e3 * s, 2) for n, s in found_s.items()})
    words = tokenizer("tide moon yeast rust chess fugue heap salt river glass north paper")["input_ids"]
    source = random.Random(0)  # every prompt is another: one that was asked before is read faster

    def draw(tokens: int) -> list[int]:
        return source.choices(words, k=tokens)

    rows: dict[int, list[tuple[float, ...]]] = {callers: [] for callers in CALLERS}
    for _ in range(ROUNDS):
        for callers, found in rows.items():
            now = pace(wrapped, costs, draw)
            rate, tpot_s = measure(wrapped, draw, callers)
            expected = [simulate(each, USAGE, callers) for each in (costs, now)]
            paces_s = [each.percentile("tpot_s", 50) for each in expected]
            found.append((*(each.tokens_per_s for each in expected), rate, *paces_s, tpot_s))
    columns = ("expected", "at the pace of its minute", "measured", "off by")
    heads = ["callers", *(f"{unit} {column}" for unit in ("tokens/s", "TPOT, ms,") for column in columns)]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    worst = 0.0
    for callers, found in rows.items():
        cells = [f"{callers}"]
        for first, scale, form in ((0, 1.0, ".0f"), (3, 1e3, ".1f")):
            off = median(row[first + 1] / row[first + 2] - 1 for row in found)
            worst = max(worst, abs(off))
            cells += [f"{scale * median(row[first + k] for row in found):{form}}" for k in range(3)] + [f"{off:+.0%}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
