"""autotune beside what a user would pick instead, in one run. See README.md in this directory.

    make bench
    python -m benchmarks.bench --only autotune-strict,llama.cpp-q8_0 --quick

Prints Markdown; writes bench.md, bench.json and bench.png.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from autotune.cli import demo
from autotune.machine import cache_dir, hardware, peaks
from autotune.machine import device as devices
from autotune.model import gguf as convert
from autotune.workload.texts import TEXTS
from benchmarks import chart, perturbed, quality, table
from benchmarks.cores import physical_cores
from benchmarks.measures import Metric, metrics, prompt, shapes
from benchmarks.peers import PEERS, REFERENCE, VLLM_PYTHON, Home, Setup, chosen
from benchmarks.results import Run
from benchmarks.stage import UNTIMED, Stage

ROUNDS, QUICK_ROUNDS = 4, 2
QUICK_TEXTS = 4
TUNED = 24  # prompts to tune for, of each of two lengths
TUNED_FROM = 2 * UNTIMED  # their numbers


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(peer.name for peer in PEERS)
    parser.add_argument("--rounds", type=int, help=f"timed rounds; default {ROUNDS}, {QUICK_ROUNDS} with --quick")
    parser.add_argument("--only", default="", metavar="NAME,...", help=f"some of {names}; the reference always runs")
    extent = parser.add_mutually_exclusive_group()
    for name, what in (("quick", "few shapes, few rounds, little text"), ("long", "lengths up to 8000 tokens")):
        extent.add_argument(f"--{name}", action="store_const", const=name, dest="extent", help=what)
    parser.set_defaults(extent="usual")
    parser.add_argument("--perturbed", action="store_true", help="weights that bear no 4 bits: perturbed.py")
    parser.add_argument("--cold", action="store_true", help="measure cold starts again, with emptied caches")
    parser.add_argument(
        "--tune-batches", default="1", metavar="N,...", help="batch sizes autotune tunes for; default 1"
    )
    parser.add_argument("--threads", type=int, help="default: the physical cores this process may use")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="default out/bench")
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter of the runtimes without torch")
    parser.add_argument("--vllm-python", default=VLLM_PYTHON, help="interpreter that has vllm; default: %(default)s")
    given = parser.parse_args()
    try:
        given.peers = chosen([name for name in given.only.split(",") if name])
    except KeyError as error:
        parser.error(error.args[0])
    given.tune_batches = [int(size) for size in given.tune_batches.split(",")]
    given.rounds = given.rounds or (QUICK_ROUNDS if given.extent == "quick" else ROUNDS)
    given.threads = given.threads or physical_cores()
    return given


def workload(text: Sequence[int], measured: Sequence[Metric]) -> list[list[int]]:
    """Prompts as long as those that are decoded from, and twice as long; the longer ones have to do without."""
    typical = next(shape.prompt_tokens for shape in shapes(measured) if shape.new_tokens > 1)
    lengths = [typical, 2 * typical] * TUNED
    return [prompt(text, TUNED_FROM + i, length) for i, length in enumerate(lengths)]


def run(given: argparse.Namespace, notify: Any) -> tuple[Run, tuple[Metric, ...]]:
    """Everything, from files to figures."""
    begin, measured = time.monotonic(), metrics(given.extent)
    torch.set_num_threads(given.threads)
    machine = hardware.identify()
    files = cache_dir.cache("peers") or given.out
    gguf = demo.model_file()
    if given.perturbed:
        gguf = perturbed.file(gguf, files)
    checkpoint = convert.checkpoint(gguf, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    text = [token for paragraph in TEXTS for token in tokenizer(paragraph)["input_ids"]]
    setup = Setup(
        checkpoint=str(checkpoint),
        gguf=str(gguf),
        files=str(files),
        threads=given.threads,
        longest=max(shape.prompt_tokens + shape.new_tokens for shape in shapes(measured)),
        workload=workload(text, measured),
        new_tokens=max(shape.new_tokens for shape in shapes(measured)),
        batch_sizes=given.tune_batches,
    )
    python: dict[Home, str] = {"torch": sys.executable, "other": given.peers_python, "vllm": given.vllm_python}
    stage = Stage(setup, text, given.out.absolute(), python, notify)
    try:
        for peer in given.peers:
            stage.admit(peer, given.cold)
        stage.warm_up(measured)
        stage.play(measured, given.rounds, peaks.reading(devices.of("cpu")))
        stage.describe()
        texts = quality.paragraphs()[: QUICK_TEXTS if given.extent == "quick" else None]
        ids = [tokenizer(paragraph)["input_ids"][: quality.TEXT_TOKENS] for paragraph in texts]
        for name, found in quality.compare(stage.remotes, REFERENCE, ids, notify).items():
            stage.results[name].quality = found
    finally:
        stage.close()
    return (
        Run(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=gguf.stem.partition(".")[0],
            machine={"name": machine.name, "capability": machine.capability, "versions": dict(machine.versions)},
            threads=given.threads,
            rounds=given.rounds,
            reference=REFERENCE,
            results=[stage.results[peer.name] for peer in given.peers],
            seconds=time.monotonic() - begin,
        ),
        measured,
    )


def main() -> None:
    given, start = options(), time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the workers end, too

    def notify(line: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {line}", file=sys.stderr, flush=True)

    found, measured = run(given, notify)
    report = table.markdown(found, measured, {peer.name: peer.rivals for peer in PEERS})
    (given.out / "bench.json").write_text(json.dumps(asdict(found), indent=2) + "\n")
    (given.out / "bench.md").write_text(report)
    try:
        chart.draw(found, measured, given.out / "bench.png")
    except ImportError:
        notify("no chart: matplotlib is not installed")
    print(report)


if __name__ == "__main__":
    main()
