"""What `autotune plan-capacity` expects of a replica against what it does, at three loads: `make bench-capacity`.

SmolLM2-135M-Instruct is tuned with the policy `throughput`, which measures callers with the prompts of tuning. Then 1,
4 and 16 callers ask for answers of another length after prompts of another length, without a pause.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any

import autotune
from autotune.cli import demo
from autotune.model.load import load
from autotune.report.capacity import Usage, costs_of, simulate
from autotune.workload import built_in

CALLERS = (1, 4, 16)
USAGE = Usage(prompt_tokens=192, new_tokens=48)
REQUESTS = 6  # of each caller; the first is not counted
ALLOWED = 0.2


def measure(model: Any, prompts: Iterator[list[int]], callers: int) -> tuple[float, float]:
    """Tokens per second of so many callers, and the median time per further token."""
    per_token, counted, began = list[float](), 0, list[float]()
    barrier, lock = threading.Barrier(callers, lambda: began.append(time.perf_counter())), threading.Lock()

    def call(own: list[list[int]]) -> None:
        nonlocal counted
        for turn, prompt in enumerate(own):
            if turn == 1:
                barrier.wait()
            options = {"max_new_tokens": USAGE.new_tokens, "min_new_tokens": USAGE.new_tokens, "do_sample": False}
            times = [time.perf_counter() for _ in model.autotune.submit(prompt, **options)]
            if turn:
                with lock:
                    counted += len(times)
                    per_token.append((times[-1] - times[0]) / (len(times) - 1))

    owned = [list(islice(prompts, REQUESTS)) for _ in range(callers)]
    threads = [threading.Thread(target=call, args=(own,)) for own in owned]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counted / (time.perf_counter() - began[0]), median(per_token)


def main() -> int:
    model, tokenizer = load(str(demo.model_file()))
    assert tokenizer is not None
    chats = built_in.chats(tokenizer)
    wrapped: Any = autotune.wrap(
        model, tokenizer=tokenizer, policy="throughput", workload=chats, when="blocking", cache=False, progress=print
    )
    costs = costs_of(wrapped.autotune.report().record)
    for name, found_s in (("reads", costs.reads_s), ("steps", costs.steps_s)):
        print(f"{name}, ms:", {n: round(1e3 * s, 2) for n, s in found_s.items()})
    words = tokenizer("tide moon yeast rust chess fugue heap salt river glass north paper")["input_ids"]
    draw = random.Random(0)  # every prompt is another: one that was asked before is read faster
    prompts = iter([draw.choices(words, k=USAGE.prompt_tokens) for _ in range(REQUESTS * sum(CALLERS))])
    heads = ("callers", "tokens/s expected", "measured", "off by", "TPOT expected, ms", "measured", "off by")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    worst = 0.0
    for callers in CALLERS:
        rate, tpot_s = measure(wrapped, prompts, callers)
        found = simulate(costs, USAGE, callers)
        expected_s = found.percentile("tpot_s", 50)
        off, tpot_off = found.tokens_per_s / rate - 1, expected_s / tpot_s - 1
        worst = max(worst, abs(off), abs(tpot_off))
        cells = [f"{callers}", f"{found.tokens_per_s:.0f}", f"{rate:.0f}", f"{off:+.0%}", f"{1e3 * expected_s:.1f}"]
        print("| " + " | ".join([*cells, f"{1e3 * tpot_s:.1f}", f"{tpot_off:+.0%}"]) + " |", flush=True)
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
