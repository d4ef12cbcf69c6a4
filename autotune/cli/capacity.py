"""`plan-capacity`: how many replicas of a machine a number of users needs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasurementError, PlanError, UnsupportedModelError
from .arguments import number, whole

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Mapping

MOST = 10**6


def arguments(command: ArgumentParser) -> None:
    """Add the command's arguments."""
    command.add_argument(
        "given",
        metavar="MODEL",
        help="a model, for this machine: its kept plan counts, or it is tuned; or a replica's report.json or plan.json",
    )
    command.add_argument("--policy", default="throughput", metavar="P", help="of a model; default throughput")
    command.add_argument("--users", type=positive, required=True, metavar="N", help="who ask again and again")
    command.add_argument("--ttft", type=positive, default=1000, metavar="MS", help="to the first token; default 1000")
    command.add_argument("--tpot", type=positive, default=100, metavar="MS", help="per further token; default 100")
    command.add_argument("--prompt-tokens", type=positive, default=256, metavar="N", help="default 256")
    command.add_argument("--new-tokens", type=positive, default=128, metavar="N", help="default 128")
    command.add_argument(
        "--machine", metavar="NAME", help="another machine that the report's advice has figures for, such as H200"
    )
    command.add_argument("--pause", type=seconds, default=0.0, metavar="S", help="before a user asks again; default 0")


def plan_capacity(args: Namespace) -> int:
    """Print how many replicas are needed, and what was assumed.

    Raises:
        PlanError: the file, or the model's plan, does not say what several callers cost.
    """
    from ..report import capacity
    from ..report.exit_codes import Code
    from .report import load
    from .screen import screen

    is_file = Path(args.given).suffix == ".json"
    record = load(Path(args.given)).record if is_file else _of_model(args.given, args.policy)
    try:
        costs = capacity.costs_of(record)
        there = None if args.machine is None else capacity.elsewhere(record, args.machine)
    except capacity.CapacityError as error:
        raise PlanError(f"{args.given}: {error}") from error
    if there is not None:
        costs = costs.sped_up(there["speedups"]["ttft"], there["speedups"]["tpot"])
    usage = capacity.Usage(args.prompt_tokens, args.new_tokens, args.pause)
    most = capacity.most_users(costs, usage, args.ttft / 1e3, args.tpot / 1e3)
    say = screen().print
    model, machine = record["model"]["name"], record["hardware"]["name"]
    where = machine if there is None else f"{there['change']}, predicted from {machine}"
    say(f"{model} on {where}, as tuned on {record['created'][:10]}", soft_wrap=True)
    if not most:
        one = capacity.simulate(costs, usage, 1)
        say(
            f"No replica is fast enough: one user alone would wait {_ms(one, 'ttft_s')} for the first token and "
            f"{_ms(one, 'tpot_s')} per further one (99 of 100 answers).",
            soft_wrap=True,
        )
        return Code.REGRESSION
    replicas = math.ceil(args.users / most)
    each = math.ceil(args.users / replicas)
    found = capacity.simulate(costs, usage, each)
    say(f"{replicas} replicas for {args.users} users: {each} each, of {most} that one holds.", soft_wrap=True)
    ttft, tpot = _ms(found, "ttft_s"), _ms(found, "tpot_s")
    rate = f"a replica makes {found.tokens_per_s:.0f} tokens per second"
    say(f"99 of 100 answers then begin within {ttft} and take {tpot} per further token; {rate}.", soft_wrap=True)
    steps = ", ".join(f"{1e3 * step_s:.1f} for {rows}" for rows, step_s in costs.steps_s.items())
    reads = " and ".join(f"{1e3 * read_s:.1f} for {tokens}" for tokens, read_s in costs.reads_s.items())
    asked = f"users ask for {usage.new_tokens} tokens after prompts of {usage.prompt_tokens}"
    say(
        f"Assumed: {asked}, with {usage.pause_s:g} s between an answer and the next request; of a prompt, a chunk "
        f"takes {reads} tokens, a step {steps} answers (ms, from the report), whatever the context; users are spread "
        "evenly; HTTP costs nothing.",
        soft_wrap=True,
    )
    if there is not None:
        gains = there["speedups"]
        say(
            f"There, prompts are read {gains['ttft']:.2f}x as fast and steps, however many answers they decode, "
            f"{gains['tpot']:.2f}x: "
            f"{there['because']}. Assumed: {there['assumes']}.",
            soft_wrap=True,
        )
    return 0


def _ms(found: object, name: str) -> str:
    return f"{1e3 * found.percentile(name, 99):.0f} ms"  # type: ignore[attr-defined]


def _of_model(name: str, policy: str) -> Mapping[str, Any]:
    """The record of a model's report: of the plan that is kept for it, verified again, or of one that is found now.

    Raises:
        UnsupportedModelError: it cannot be loaded, or has no tokenizer.
        MeasurementError: it is not tuned at all.
    """
    from ..live.wrap import wrap
    from ..model.load import load
    from ..report.progress import shown
    from ..tune.policy import load as load_policy
    from ..workload import built_in
    from .tune import known_budget_s

    chosen = load_policy(policy)
    with shown(known_budget_s(chosen)) as progress:
        progress.update(f"loading {name}")
        model, tokenizer = load(name)
        if tokenizer is None:
            raise UnsupportedModelError(
                f"{name} has no tokenizer; tune it with prompts of your own, and give its report"
            )
        chats = built_in.chats(tokenizer)  # as of `serve`, whose plan is found
        wrapped: Any = wrap(
            model, tokenizer=tokenizer, workload=chats, policy=chosen, when="blocking", progress=progress.update
        )
    if wrapped.autotune.status.state == "passed through":
        raise MeasurementError(wrapped.autotune.status.detail)
    record: Mapping[str, Any] = wrapped.autotune.report().record
    return record


def positive(text: str) -> int:
    """Parse a whole number above 0."""
    return whole(text, 1, MOST, f"a whole number of 1 to {MOST}")


def seconds(text: str) -> float:
    """Parse seconds, 0 or more."""
    return number(text, lambda found: 0 <= found < MOST, "a number of seconds, 0 or more")
