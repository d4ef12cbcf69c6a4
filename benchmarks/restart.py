"""A service that starts again with a kept plan: how long until the plan answers, and until it is verified again.

    make bench-restart
    python -m benchmarks.restart --runs 5

SmolLM2-135M-Instruct is tuned by the default policy once, unless a plan is kept already. Then processes start one after
the other: each loads the model, wraps it as a service does (`when="background"`) and asks short questions without a
pause. Seconds count from the moment that the model is loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from benchmarks.loaded import competing
from benchmarks.remote import ROOT
from benchmarks.results import spread
from benchmarks.table import NONE, grid, number

if TYPE_CHECKING:
    from autotune.live.options import When

TOKENS = 8  # of every answer
LONGEST_S = 600.0  # from when on it is given up


def serve(when: When) -> dict[str, Any]:
    """One life of the service; what happened when, in seconds from the moment that the model was loaded.

    Args:
        when: "background", or "blocking" to tune it where no plan is kept.
    """
    start = time.monotonic()
    import autotune
    from autotune.cli import demo
    from autotune.model.load import load
    from autotune.workload import built_in

    model, tokenizer = cast("tuple[Any, Any]", load(str(demo.model_file())))
    loaded = time.monotonic()
    found: dict[str, Any] = {"loading": loaded - start}
    autotune.wrap(model, tokenizer=tokenizer, workload=built_in.chats(tokenizer), when=when, progress=None)
    found["wrap returned"] = time.monotonic() - loaded
    handle: Any = model.autotune
    asked = tokenizer(demo.QUESTION, return_tensors="pt")
    while time.monotonic() - loaded < LONGEST_S and not {"first answer", "by the plan", "verified"} <= found.keys():
        model.generate(**asked, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        now = time.monotonic() - loaded
        found.setdefault("first answer", now)
        if handle.status.served:
            found.setdefault("by the plan", now)
        if handle.status.state == "tuned":
            found.setdefault("verified", now)
        elif handle.status.state != "tuning":
            break
    found["state"], found["detail"] = handle.status.state, handle.status.detail
    return found


def life(when: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.restart", "--life", when]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="starts; default 5")
    parser.add_argument("--taken", type=int, default=0, help="processes that compete with all of it; default 0")
    parser.add_argument("--life", choices=("background", "blocking"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.life:
        print(json.dumps(serve(given.life)))
        return 0
    with competing(given.taken):
        first = life("blocking")
        print(f"The plan was there {first['wrap returned']:.0f} s after loading: {first['detail']}", flush=True)
        if first["state"] != "tuned":
            return 1
        lives = [life("background") for _ in range(given.runs)]
    print(table(lives))
    for each in lives:
        if "verified" not in each:
            print(f"A start was not verified: {each['state']}, {each['detail']}")
    return 0


def table(lives: Sequence[dict[str, Any]]) -> str:
    """Seconds by what happened: median, least and most of the lives in which it did."""
    rows = []
    for what in ("loading", "wrap returned", "first answer", "by the plan", "verified"):
        seconds = [each[what] for each in lives if what in each]
        found = spread(seconds)
        cells = [NONE] * 3 if found is None else [number(found.median), number(found.low), number(found.high)]
        rows.append([what, *cells, str(len(seconds))])
    return grid(["seconds", "median", "least", "most", f"of {len(lives)} starts"], rows)


if __name__ == "__main__":
    sys.exit(main())
