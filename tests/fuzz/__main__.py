"""`python -m tests.fuzz`: fuzz for some minutes; with --reverts, show which mended faults are found again."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long; for --reverts, at most for each")
    parser.add_argument("--seed", type=int, help="of the first round; default: the time")
    parser.add_argument("--examples", type=int, default=20, help="in a round, which is what one seed gives")
    parser.add_argument("--keep-on", action="store_true", help="go on after a finding, with the next seed")
    parser.add_argument("--reverts", nargs="*", metavar="NAME", help="bring faults back: these, or all")
    options = parser.parse_args(argv)
    kernels = Path(tempfile.gettempdir()) / f"autotune-fuzz-{os.getuid()}"
    kernels.mkdir(mode=0o700, exist_ok=True)
    os.environ.setdefault("AUTOTUNE_CACHE_DIR", str(kernels))  # kernels are built once
    if options.reverts is not None:
        from tests.fuzz import reverts

        return reverts.main(options.reverts, options.minutes, options.seed or 0)
    return fuzz(options.minutes, options.seed or int(time.time()), options.examples, options.keep_on)


def fuzz(minutes: float, seed: int, examples: int, keep_on: bool) -> int:
    from tests.fuzz.pair import COUNTS

    start, findings = time.monotonic(), 0
    while time.monotonic() - start < 60 * minutes and (keep_on or not findings):
        finding, seed = round_of(seed, examples), seed + 1
        if finding is not None:
            findings += 1
            print(f"\nFINDING {findings}, --seed {seed - 1} --examples {examples}\n{finding}", flush=True)
    spent = (time.monotonic() - start) / 60
    print(f"\n{spent:.1f} minutes, {findings} findings; how often what was done:")
    for name, count in sorted(
        COUNTS.items(), key=lambda each: (each[0].startswith(("kind", "change ", "plan ")), each)
    ):
        print(f"{count:8d}  {name}")
    return 1 if findings else 0


def round_of(seed: int, examples: int, shrink: bool = True) -> str | None:
    """What the examples of one seed find: the shortest sequence that shows it, and how it shows; or None."""
    import hypothesis
    from hypothesis.stateful import run_state_machine_as_test

    from tests.fuzz.machine import Machine, configured

    class Seeded(Machine):
        pass

    Seeded.TestCase.settings = configured(examples, random=True, shrink=shrink)
    try:
        run_state_machine_as_test(
            hypothesis.seed(seed)(Seeded), settings=configured(examples, random=True, shrink=shrink)
        )
    except Exception as error:
        return "\n".join(described(error))
    return None


def described(error: BaseException) -> Iterator[str]:
    """The sequence, what went wrong, and where that was in files of this project."""
    yield from getattr(error, "__notes__", [])
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from described(each)
        return
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.startswith(str(ROOT)):
            yield f"  {Path(frame.filename).relative_to(ROOT)}:{frame.lineno} {frame.name}"
    yield f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
