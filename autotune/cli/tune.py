"""`demo`, `tune` and `profile`: the commands that load a model and measure."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MeasurementError, PackageError, UnsupportedModelError, WorkloadError
from ..machine.cache_dir import expanded
from ..profile.ncu import command, parse
from ..report import Report
from ..report.printable import printable
from ..report.progress import Progress, shown
from ..tune.policy import Policy
from ..tune.policy import load as load_policy
from ..workload import PHASES, Phase
from .screen import screen

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..diagnose.diagnosis import Diagnosis
    from ..profile.ncu import NcuExport
    from ..tune.findings import Findings

PROFILE_BUDGET_S = 60.0


def tune(args: Namespace) -> int:
    """Tune a model, print the report, write report.md, report.json, report.html and plan.json.

    Raises:
        MeasurementError: none of the wanted candidates could be tried; the report is written anyway.
    """
    model, _ = _tuned(args, args.model, args.prompts, keep_original=not args.release)
    _require_tries(model)
    return 0


def demo(args: Namespace) -> int:
    """Tune the demo model, then let original and plan answer the same question.

    Raises:
        MeasurementError: none of the wanted candidates could be tried; the report is written anyway.
    """
    from . import demo as stage

    model, tokenizer = _tuned(args, str(stage.model_file()), None)
    if tokenizer is None:
        raise UnsupportedModelError("the demo's model lost its tokenizer; remove it from the cache directory")
    _require_tries(model)
    original, tuned = stage.answers(model, tokenizer)
    draw_answers(screen(), stage.QUESTION, original, tuned)
    return 0


def _require_tries(model: PreTrainedModel) -> None:
    """Raise MeasurementError if tuning wanted to try candidates, but could try none."""
    from ..tune.verdict import is_fruitless

    handle: Any = model.autotune
    if is_fruitless(handle.plan.trials):
        raise MeasurementError(handle.report().to_dict()["verdict"])


def _tuned(
    args: Namespace, name: str, prompts: Path | None, keep_original: bool = True
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    from ..live.wrap import wrap

    policy = _policy(args)
    out = _folder(args.out, name)
    with shown(known_budget_s(policy)) as progress:
        with _kernels_being_built():
            model, tokenizer = _load(args, name, prompts, progress)
        model = wrap(
            model,
            tokenizer=tokenizer,
            workload=_workload(prompts, tokenizer),
            policy=policy,
            when="blocking",
            cache=not args.no_cache,
            keep_original=keep_original,
            progress=progress.update,
        )
    handle: Any = model.autotune
    if handle.status.state == "passed through":
        raise MeasurementError(handle.status.detail)
    from ..tune import plan

    report = handle.report()
    doubt = report.to_dict().get("doubt")
    _hand_over(report, out, "report", {} if doubt else {"plan.json": plan.dumps(handle.plan)})
    if doubt:
        earlier = "; the one that is there is of an earlier run" if (out / "plan.json").exists() else ""
        screen().print(f"No plan.json{earlier}: {doubt}", soft_wrap=True)
    return model, tokenizer


@contextmanager
def _kernels_being_built() -> Iterator[None]:
    """Compile CPU operators that are not cached in a thread while the block runs. The block must not time anything."""
    import torch

    from ..machine import ending
    from ..runtime import kernels

    def build() -> None:
        if not torch.cuda.is_available():
            kernels.available()

    builder = ending.Worker(build, "autotune kernels")
    begun = False
    with suppress(ending.NoThreadError):  # no thread can be started; it would only save time
        begun = builder.launch()
    yield
    if begun:
        builder.join()


def profile(args: Namespace) -> int:
    """Profile and diagnose both phases. Nothing is tried."""
    if args.replay:
        return replay(args)
    if args.ncu in PHASES and args.ncu_csv is None:
        screen().print(command(args.model, args.ncu, args.prompts), soft_wrap=True)
        return 0
    from ..tune.record import report_of

    counted = {_counted_phase(args): _reading(args.ncu_csv)} if args.ncu_csv else {}
    out = _folder(args.out, args.model) if args.out else None
    budget_s = args.budget or PROFILE_BUDGET_S
    with shown(budget_s) as progress:
        model, tokenizer = _load(args, args.model, args.prompts, progress)
        found = profiled(model, _workload(args.prompts, tokenizer), tokenizer, budget_s, progress.update, counted)
    _hand_over(report_of(found), out, "profile", {})
    if args.ncu == "auto" and not counted:
        phase = in_question(found.diagnoses_before)
        console = screen()
        console.print(f"What {phase}'s kernels do in detail, Nsight Compute counts:")
        console.print(command(args.model, phase, args.prompts), soft_wrap=True)
    return 0


def replay(args: Namespace) -> int:
    """Run one phase of the model once, for an external profiler."""
    from .. import workload
    from ..profile import ncu_replay
    from ..profile.survey import median_prompts

    with shown(PROFILE_BUDGET_S) as progress:
        model, tokenizer = _load(args, args.model, args.prompts, progress)
    work = workload.read(_workload(args.prompts, tokenizer), tokenizer=tokenizer, model=model)
    ncu_replay.replay(model, median_prompts(work, work.batch_sizes[0]).to(model.device), args.replay)
    return 0


def in_question(diagnoses: Mapping[Phase, Diagnosis]) -> Phase:
    """The phase that is furthest from its roofline."""
    return min(diagnoses, key=lambda phase: diagnoses[phase].roofline_share)


def _counted_phase(args: Namespace) -> Phase:
    """The phase that an Nsight export covers: from the option, else from the file's name, else decode."""
    if args.ncu in PHASES:
        phase: Phase = args.ncu
        return phase
    return "prefill" if args.ncu_csv.name.startswith("prefill") else "decode"


def _reading(file: Path) -> NcuExport:
    try:
        return parse(file.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise WorkloadError(f"--ncu-csv {file} cannot be read: {error.strerror}") from error
    except MeasurementError as error:
        raise WorkloadError(f"--ncu-csv {file}: {error}") from error


def profiled(
    model: PreTrainedModel,
    prompts: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    budget_s: float,
    notify: Callable[[str], None],
    counted: Mapping[Phase, NcuExport] | None = None,
) -> Findings:
    """Profile and diagnose the model as it is.

    Args:
        model: the model.
        prompts: the workload, as `wrap` takes it.
        tokenizer: encodes prompts given as text.
        budget_s: time to profile, seconds.
        notify: called with a sentence for each step.
        counted: counters from Nsight Compute, by phase.

    Raises:
        UnsupportedModelError: the model cannot be tuned.
    """
    from .. import profile as profiling
    from .. import workload
    from ..diagnose.diagnosis import diagnose, supported
    from ..machine import hardware
    from ..runtime.variant import Variant
    from ..tune.findings import Findings
    from ..tune.run import describe, name_of
    from ..tune.supported import unsupported

    if reason := unsupported(model):
        raise UnsupportedModelError(reason)
    work = workload.read(prompts, tokenizer=tokenizer, model=model)
    notify("measuring the hardware")
    machine = hardware.probe(model)
    measured = profiling.measure(Variant(model), work, machine, budget_s=budget_s, progress=notify)
    diagnoses = {phase: diagnose(found, machine) for phase, found in measured.phases.items()}
    for phase, reading in (counted or {}).items():
        diagnoses[phase] = supported(diagnoses[phase], reading.evidence())
    return Findings(
        model=name_of(model),
        parameters=model.num_parameters(),
        hardware=machine,
        workload=describe(work),
        before=measured,
        diagnoses_before=diagnoses,
        verdict="profiled as it is; nothing was tried",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        ncu=counted or {},
    )


def draw_answers(console: Console, question: str, *answers: Any) -> None:
    """Print the answers to the same question side by side."""
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    console.print(Text(f"The same question to both, once each: {printable(question)}", style="bold"))
    width = max(30, console.width // len(answers) - 1)
    titles = ("original", "tuned")
    console.print(
        Columns(
            Panel(
                Text(printable(answer.text)),
                title=title,
                subtitle=f"{answer.tokens_per_s:.0f} tok/s, {answer.tokens} tokens in {answer.seconds:.1f} s",
                width=width,
            )
            for title, answer in zip(titles, answers, strict=True)
        )
    )


def _policy(args: Namespace) -> Policy:
    policy = load_policy(args.policy)
    return replace(policy, budget_s=args.budget) if args.budget else policy


def known_budget_s(policy: Policy) -> float | None:
    """Seconds of a policy's budget if they are known before the model is loaded and measured, else None."""
    import torch

    from ..tune.budget import known

    return known(policy.budget_s, "cuda" if torch.cuda.is_available() else "cpu")


def _load(
    args: Namespace, name: str, prompts: Path | None, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    import torch

    from ..model.load import load

    if prompts is not None and not prompts.is_file():  # fails before minutes of loading
        raise WorkloadError(f"there is no file {prompts}; expected prompts, one a line, or .jsonl")
    if args.threads:
        torch.set_num_threads(args.threads)
    progress.update(f"loading {name}")
    return load(name)


def _workload(prompts: Path | None, tokenizer: PreTrainedTokenizerBase | None) -> Any:
    from ..workload import built_in

    if prompts is not None:
        return prompts
    if tokenizer is None:
        raise WorkloadError("the model has no tokenizer: give prompts as token ids, --prompts FILE.jsonl")
    return built_in.chats(tokenizer)


def _folder(out: Path | None, model: str) -> Path:
    """Make the folder for the results and check that it is writable, before the long work begins."""
    name = os.path.basename(os.path.realpath(expanded(model))).removesuffix(".gguf")
    folder = out or Path("out") / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WorkloadError(f"--out {folder} cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise WorkloadError(f"--out {folder} is not writable")
    return folder


def _hand_over(report: Report, folder: Path | None, stem: str, others: dict[str, str]) -> None:
    """Print the report, then write it and `others` into the folder."""
    console = screen()
    report.to_terminal(console)
    if folder is None:
        return
    files = {f"{stem}.md": report.to_markdown(), f"{stem}.json": report.to_json()} | others
    for name, text in files.items():
        _write(folder / name, text)
    page = f"{stem}.html"  # last, so that the results are saved even if drawing the charts fails
    try:
        _write(folder / page, report.to_html())
    except PackageError as error:
        console.print(f"No {page}: {error}")
    else:
        files[page] = ""
    console.print(f"Written to {folder}: {', '.join(files)}", style="bold")


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise MeasurementError(f"{file} cannot be written: {error.strerror}") from error
