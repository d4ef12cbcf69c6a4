"""Guessing ahead over a recorded step: what a step of several tokens costs, and what right guesses bring.

    python -m benchmarks.guesses

SmolLM2-135M-Instruct with INT8 weights in a recorded step. Tokens are guessed by look-up in the prompt and the answer
so far. Two kinds of text: prompts that ask for a passage once more, word for word, and conversations. The answers are
those that the model gives; each is compared with the answer without guesses. Rounds take turns; ratios are within one.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from autotune import transforms
from autotune.cli import demo
from autotune.machine import processor
from autotune.model import route
from autotune.model.load import load
from autotune.runtime.cache.rows import RowCache
from autotune.runtime.dispatch import serving
from autotune.runtime.steps.program import StepPrograms
from autotune.runtime.variant import Variant
from autotune.transforms.speculation import Speculation
from autotune.workload import Workload, built_in
from autotune.workload.texts import TEXTS
from benchmarks.loaded import ratios, spread
from benchmarks.table import grid

PLAN: tuple[tuple[str, dict[str, Any]], ...] = (("weight_only", {"bits": 8}), ("step_program", {}))
PASSAGE_TOKENS = 120
TOKENS_AT_ONCE = (2, 4, 8)
TIMED = 20  # runs of a step; the median counts


def cost(plan: Variant) -> list[list[str]]:
    """The time of steps of several tokens, beside that of one."""
    steps, pool, example = plan.step, plan.caches, plan.example(1)
    assert isinstance(steps, StepPrograms)
    assert pool is not None
    with pool.lend(example, None) as cache:
        single = steps.fitting(cache)
        one_s = seconds(lambda: single(torch.ones(1, 1, dtype=torch.int64), cache.slot[None], cache))
        rows = [["1", f"{1e3 * one_s:.2f}", ""]]
        for count in TOKENS_AT_ONCE:
            steps.prepare_several(partial(RowCache, example, pool.slots, count, pool.dtype))
            several = steps.several(count, cache)
            assert several is not None
            tokens, positions = torch.ones(1, count, dtype=torch.int64), cache.slot + torch.arange(count)[None]
            took_s = seconds(partial(several.step, tokens, positions, cache))
            rows.append([str(count), f"{1e3 * took_s:.2f}", f"{took_s / one_s:.2f}x"])
    return rows


def seconds(work: Callable[[], object]) -> float:
    took = []
    for _ in range(TIMED + 3):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return median(took[3:])


def prompts(tokenizer: Any) -> dict[str, list[list[int]]]:
    """Prompts by kind of text."""
    passages = [tokenizer.decode(tokenizer(text)["input_ids"][:PASSAGE_TOKENS]) for text in TEXTS]
    asking = [f"Repeat the following text exactly, word for word:\n\n{passage}" for passage in passages]
    told = [[{"role": "user", "content": text}] for text in asking]
    copied = [tokenizer.apply_chat_template(each, add_generation_prompt=True, return_dict=False) for each in told]
    return {"repeats its prompt": copied, "conversation": [list(chat) for chat in built_in.chats(tokenizer)]}


def answer(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], float]:
    """Tokens, and seconds for each after the first."""
    times: list[float] = []

    class Clock:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                times.append(time.perf_counter())

        def end(self) -> None: ...

    ids = torch.tensor([prompt])
    found: list[int] = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, streamer=Clock()
    )[0].tolist()
    return found[len(prompt) :], (times[-1] - times[0]) / (tokens - 1)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="prompts of each kind; default 5")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens of an answer; default 100")
    given = parser.parse_args(arguments)
    model, tokenizer = load(str(demo.model_file()))
    texts = prompts(tokenizer)
    work = Workload(tuple(map(tuple, texts["repeats its prompt"])), given.tokens)
    plan = Variant(model, workload=work).with_transforms([transforms.make(n, p, "decode") for n, p in PLAN])
    guessing = plan.with_transform(Speculation("decode"))
    assert guessing.speculation is not None
    served = {"plain": route.greedy(serving(plan), 0), "guessing": route.greedy(serving(guessing), 0)}
    print(f"\n{processor.name()} ({processor.instruction_set()}), {torch.get_num_threads()} threads\n")
    print(grid(["tokens at once", "ms", "of one"], cost(plan)))
    draw, rows, differing = random.Random(0), [], 0
    for kind, of_kind in texts.items():
        took: dict[str, list[float]] = {name: [] for name in served}
        before = guessing.speculation.tally
        for prompt in [of_kind[0], *of_kind[: given.rounds]]:  # the first one warms up
            found = {name: answer(served[name], prompt, given.tokens) for name in draw.sample(sorted(served), 2)}
            differing += found["plain"][0] != found["guessing"][0]
            for name, (_, each_s) in found.items():
                took[name].append(1e3 * each_s)
        took = {name: ms[1:] for name, ms in took.items()}
        tally = guessing.speculation.tally
        right, guessed = tally.right - before.right, tally.guessed - before.guessed
        gain = spread(ratios(took["plain"], took["guessing"]), "x")
        rows.append([kind, spread(took["plain"]), spread(took["guessing"]), gain, f"{right} of {guessed}"])
    print()
    print(grid(["text", "plain, ms per token", "guessing, ms per token", "times as fast", "right guesses"], rows))
    print(f"\n{differing} answers differ")
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
