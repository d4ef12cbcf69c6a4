"""Callers who share one model: tokens per second of 1, 4 and 16 callers, decoded together and one at a time.

    make bench-serving
    python -m benchmarks.serving --callers 1,8 --rounds 3

SmolLM2-135M-Instruct with INT8 weights and what tuning finds for prefill, put on by hand. Every caller is a thread that
asks for one answer after the other. "Together" is continuous batching; "8-bit activations" adds those, which the other
runtimes have, too, with INT4 weights (lm_head at 8 bits) where the processor does not multiply INT8 by bytes; "one at a
time" is the plan behind a lock; "the original" is the model as it is, behind a lock and without one; "a closed batch"
is one call with as many prompts as there are callers. llama.cpp, with a slot for each caller, and OpenVINO GenAI's
continuous batching answer the same requests, each in a process of its own that is idle while others are timed. Callers
are steady: the first and the last request of each are not timed, but keep the others company. Nor is the first call of
a closed batch timed. Every round runs all of them in an order drawn anew, one number of callers after the other. Ratios
are within a round. At the end the divergence of each from the original on held-out text is printed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autotune import transforms
from autotune.cli import demo
from autotune.machine import cache_dir, intraop
from autotune.model import route
from autotune.model.gguf import checkpoint
from autotune.model.load import load
from autotune.runtime import kernels
from autotune.runtime.dispatch import serving
from autotune.runtime.variant import Variant
from autotune.validate.divergence import Divergence
from autotune.workload import Workload, built_in
from benchmarks import quality
from benchmarks.loaded import ratios, spread
from benchmarks.measures import steady
from benchmarks.peers import PEERS, VLLM, VLLM_PYTHON, Home, Setup
from benchmarks.peers.fixed import multiplies_bf16
from benchmarks.remote import WorkerError
from benchmarks.results import Quality
from benchmarks.stage import REQUEST_S, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Parts = tuple[tuple[str, str, dict[str, Any]], ...]  # transforms: name, phase, parameters

SHORT: Parts = (  # other runtimes round activations, too
    ("int8_activations", "prefill", {}),
    ("int8_activations", "decode", {}),
)
WAIT_MS = 20.0  # as in policies/throughput.toml
TOGETHER, ROUNDED, ALONE = "together", "together, 8-bit activations", "one at a time"
ORIGINAL, AT_ONCE, CLOSED = "the original", "the original, without a lock", "a closed batch"
UNLOCKED = (TOGETHER, ROUNDED, AT_ONCE)
ORIGINALS = (ORIGINAL, AT_ONCE)
RIVALS = ("llama.cpp-q8_0", "openvino-q8_0", "openvino-q8_0-f32", VLLM)  # see benchmarks.peers


Ask = Callable[[list[int]], None]
Rates = dict[tuple[str, int], float]  # tokens per second by (way, callers)


def plan(bits: int = 8) -> Parts:
    """What tuning finds for this processor, with INT8 weights, or INT4 but for lm_head."""
    weights = {"bits": 8} if bits == 8 else {"bits": 4, "wide": "lm_head"}
    bf16 = multiplies_bf16()
    return (
        ("weight_only", "decode", weights),
        ("linear_bf16", "prefill", {"weights": "decode"}) if bf16 else ("packed_prefill", "prefill", {}),
        ("fused_layers", "prefill", {}),
        ("prefill_attention", "prefill", {"precision": "bfloat16"} if bf16 else {}),
        ("one_query_attention", "decode", {}),
        ("half_cache", "decode", {}),
        ("step_program", "decode", {}),
    )


def plans(original: PreTrainedModel, prompts: list[list[int]], tokens: int, rows: int) -> dict[str, Variant]:
    """The plan, alone and with continuous batching, and this with activations of 8 bits."""
    work = Workload(tuple(map(tuple, prompts)), tokens)
    batching = transforms.make("continuous_batching", {"rows": rows, "wait_ms": WAIT_MS}, "decode")
    chains = {TOGETHER: plan(), ALONE: plan()}
    if able := [bits for bits in (8, 4) if kernels.no_byte_unit(bits) is None]:
        chains[ROUNDED] = (*plan(able[0]), *SHORT)
    found = {}
    for name, parts in chains.items():
        chain = [transforms.make(each, params, phase) for each, phase, params in parts]
        chain += [] if name == ALONE else [batching]
        found[name] = Variant(original, workload=work).with_transforms(chain)
        if (engine := found[name].engine) is not None:  # prompts come again here; each is to be computed
            engine.remember(False)
    return found


def ways(original: PreTrainedModel, variants: Mapping[str, Variant], tokens: int) -> tuple[dict[str, Ask], Any]:
    """How one caller asks, by way; and the plan's model, for closed batches."""
    found = {name: serving(variant) for name, variant in variants.items()} | dict.fromkeys(ORIGINALS, original)
    served = {name: route.greedy(model, pad_token_id=0) for name, model in found.items()}  # no token ends an answer
    lock = threading.Lock()

    def asking(name: str) -> Ask:
        def ask(ids: list[int]) -> None:
            with nullcontext() if name in UNLOCKED else lock:
                answer(served[name], [ids], tokens)

        return ask

    return {name: asking(name) for name in served}, served[ALONE]


@torch.no_grad()
def fidelity(
    original: PreTrainedModel, variants: Mapping[str, Variant], rivals: Rivals, tokenizer: Any
) -> dict[str, Quality]:
    """How far each is from the original on the held-out paragraphs: the worse of prefill and decode."""
    parts: dict[tuple[str, str], list[Divergence]] = defaultdict(list)
    for text in quality.paragraphs():
        ids = tokenizer(text)["input_ids"][: quality.TEXT_TOKENS]
        given = torch.tensor([ids])
        right = original(given).logits[0, :-1].numpy()  # the last would be compared with nothing
        for name, variant in variants.items():
            for phase, module in variant.modules.items():
                parts[name, phase].append(quality.diverge(right, module(given).logits[0, :-1].float().numpy(), ids))
        for name in rivals.labels:
            for path, rows in rivals.logits(name, ids).items():
                parts[name, path].append(quality.diverge(right, rows, ids))
    found: dict[str, Quality] = {}
    for (name, _), each in parts.items():
        found[name] = max(filter(None, (found.get(name), quality.summary(each))), key=lambda q: q.mean_kld)
    return found


def answer(served: Any, prompts: list[list[int]], tokens: int) -> None:
    """One call of generate for all prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    served.generate(ids, attention_mask=mask, max_new_tokens=tokens)


def requests(callers: int, each: int, prompts: list[list[int]]) -> list[list[list[int]]]:
    """The prompts of each caller: of the `each` that are counted, and of one before and one after them."""
    each += 2
    return [[prompts[(number * each + k) % len(prompts)] for k in range(each)] for number in range(callers)]


def rate(ask: Ask, callers: int, each: int, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of so many steady callers, in `each` requests of each; see `measures.steady`."""

    def caller(own: list[list[int]]) -> None:
        for ids in own:
            ask(ids)
            ended.append(time.perf_counter())

    ended = list[float]()
    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(caller, requests(callers, each, prompts)))
    return steady(ended, callers, each, tokens)


class Rivals:
    """Other runtimes that answer the same requests. One that does not start or fails is left out, with its reason."""

    def __init__(self, asked: argparse.Namespace, most: int) -> None:
        self.stage: Stage | None = None
        if asked.without_peers:
            return
        gguf = demo.model_file()
        setup = Setup(
            checkpoint=str(checkpoint(gguf, torch.float32)),
            gguf=str(gguf),
            files=str(cache_dir.cache("peers") or asked.out),
            threads=torch.get_num_threads(),
            longest=max(72, asked.prompt_tokens + asked.tokens),
            batch_sizes=(most,),
        )
        paragraph = list(range(100, 1000))  # prompts that nothing is measured with
        python: dict[Home, str] = {"torch": sys.executable, "other": asked.peers_python, "vllm": asked.vllm_python}
        self.stage = Stage(setup, paragraph, asked.out.absolute(), python, notify)
        for name in RIVALS:
            self.stage.admit(next(peer for peer in PEERS if peer.name == name), cold=False)

    @property
    def labels(self) -> dict[str, str]:
        """Those that run, by name."""
        return {} if self.stage is None else {name: self.stage.results[name].label for name in self.stage.remotes}

    def rate(self, name: str, callers: int, each: int, prompts: list[list[int]], tokens: int) -> float:
        """Tokens per second of so many steady callers, in `each` requests of each; see `measures.steady`."""
        assert self.stage is not None
        request = {"do": "serve", "asked": requests(callers, each, prompts), "new_tokens": tokens}
        return steady(self.stage.remotes[name].ask(request, REQUEST_S), callers, each, tokens)

    def logits(self, name: str, ids: list[int]) -> dict[str, np.ndarray]:
        """Logits [tokens, V] by the path that computed them; empty if it gives none."""
        assert self.stage is not None
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                return quality.logits(self.stage.remotes[name], ids, folder)
        except WorkerError:
            return {}

    def close(self) -> None:
        if self.stage is not None:
            self.stage.close()


def notify(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def closed(served: Any, callers: int, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of one call with as many prompts as there are callers, after one that is not timed."""
    answer(served, prompts[:callers], tokens)
    start = time.perf_counter()
    answer(served, prompts[:callers], tokens)
    rate = callers * tokens / (time.perf_counter() - start)
    intraop.rest()
    return rate


def options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make bench-serving BENCH_ARGS=...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--callers", default="1,4,16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=3, help="of each caller in a round")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a request")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16, help="sequences that are decoded together at most")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the runtimes without torch")
    parser.add_argument("--vllm-python", default=VLLM_PYTHON, help="interpreter that has vllm; default: %(default)s")
    parser.add_argument("--without-peers", action="store_true", help="without the other runtimes")
    parser.add_argument("--out", type=Path, default=Path("out/serving"), help="for their files and logs")
    parser.add_argument("--without-original", action="store_true", help="it takes most of the time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked = options(arguments)
    model, tokenizer = load(str(demo.model_file()))
    texts = built_in.chats(tokenizer)  # type: ignore[arg-type]
    prompts = [(text * 20)[: asked.prompt_tokens] for text in texts]
    numbers = [int(n) for n in asked.callers.split(",")]
    variants = plans(model, prompts, asked.tokens, asked.rows)
    asks, batched = ways(model, variants, asked.tokens)
    if asked.without_original:
        for name in ORIGINALS:
            del asks[name]
    for name, ask in asks.items():
        for number in numbers:  # programs are recorded, slots are made
            rate(ask, number if name in (TOGETHER, ROUNDED) else 1, 1, prompts, asked.tokens)
    for number in numbers:
        closed(batched, number, prompts, asked.tokens)
    intraop.rest()  # as `wrap` does in the thread that loads the model
    rivals = Rivals(asked, max(numbers))
    try:
        found = play(asked, numbers, asks, batched, rivals, prompts)
        exact = fidelity(model, variants, rivals, tokenizer)
    finally:
        rivals.close()
    print(
        f"\n{torch.get_num_threads()} threads; prompts of {asked.prompt_tokens} tokens, {asked.tokens} new ones, "
        f"{asked.requests} requests of each caller; {asked.rounds} rounds; median [lowest, highest]\n"
    )
    print("| tokens per second | " + " | ".join(f"{n} callers" for n in numbers) + " |")
    print("|---" * (len(numbers) + 1) + "|")
    names = dict.fromkeys((*asks, CLOSED)) | rivals.labels
    for name, label in names.items():
        print(f"| {label or name} | " + " | ".join(spread([r[name, n] for r in found]) for n in numbers) + " |")
    for ours in filter(asks.__contains__, (TOGETHER, ROUNDED)):
        for name, label in names.items():
            gains = (ratios([r[ours, n] for r in found], [r[name, n] for r in found]) for n in numbers)
            if name not in (TOGETHER, ROUNDED):
                print(f"| {ours} / {label or name} | " + " | ".join(spread(gain, "x") for gain in gains) + " |")
    print("\n| against the original, on held-out text | mean KLD | same top token |\n|---|---|---|")
    for name, read in exact.items():
        print(f"| {names[name] or name} | {read.mean_kld:.5f} | {read.same_top:.1%} |")
    return 0


def play(
    asked: argparse.Namespace,
    numbers: list[int],
    asks: dict[str, Ask],
    batched: Any,
    rivals: Rivals,
    prompts: list[list[int]],
) -> list[Rates]:
    """Tokens per second by round."""
    for name in rivals.labels:
        for number in numbers:  # contexts are made
            rivals.rate(name, number, 1, prompts, asked.tokens)
    draw, found, names = random.Random(0), list[Rates](), (*asks, CLOSED, *rivals.labels)
    for turn in range(asked.rounds):
        this: Rates = {}
        cases = [(n, name) for n in draw.sample(numbers, len(numbers)) for name in draw.sample(names, len(names))]
        for number, name in cases:  # what is compared is timed soon after one another
            if name == CLOSED:
                this[name, number] = closed(batched, number, prompts, asked.tokens)
            elif name in asks:
                this[name, number] = rate(asks[name], number, asked.requests, prompts, asked.tokens)
            else:
                this[name, number] = rivals.rate(name, number, asked.requests, prompts, asked.tokens)
        found.append(this)
        notify(f"round {turn + 1} of {asked.rounds}")
    return found


if __name__ == "__main__":
    sys.exit(main())
