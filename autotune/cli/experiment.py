"""`experiment run`, `experiment status` and `experiment report`."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExperimentError
from ..report.exit_codes import OF_VERDICT
from .screen import screen

if TYPE_CHECKING:
    from ..compare.experiment import Result, Store
    from ..compare.experiment.store import Concluded, Version
    from ..report.layout import Section


def add_arguments(experiment: ArgumentParser) -> None:
    """Add the options of the three commands."""
    from .arguments import threads

    kind = type(experiment)
    actions = experiment.add_subparsers(dest="action", required=True, metavar="run|status|report", parser_class=kind)
    run = actions.add_parser("run", help="measure; the exit code is the verdict")
    run.add_argument("file", metavar="FILE.toml", type=Path, help="control, candidates, workload, tier, budget_s")
    run.add_argument("--threads", type=threads, metavar="N", help="CPU threads")
    status = actions.add_parser("status", help="the experiments kept, or one's versions and events")
    status.add_argument("name", metavar="NAME", nargs="?")
    report = actions.add_parser("report", help="a kept result again, with its exit code")
    report.add_argument("name", metavar="NAME")
    form = report.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    for command in (run, report):
        command.add_argument("--chart", metavar="OUT", type=Path, help="draw speed against quality: .svg, .png or .pdf")
    for command in (run, status, report):
        command.add_argument(
            "--store", metavar="FILE", type=Path, help="where experiments are kept; default in the cache directory"
        )


def experiment(args: Namespace) -> int:
    """Run one of the three commands."""
    return {"run": run, "status": status, "report": report}[args.action](args)


def run(args: Namespace) -> int:
    """Run an experiment from a file, print its result, and return the verdict as an exit code."""
    import torch

    from ..compare.experiment import chart, sheet
    from ..report.progress import shown

    if args.chart:
        chart.require_format(args.chart)
    if args.threads:
        torch.set_num_threads(args.threads)
    asked = sheet.load(args.file)
    experiment = asked.experiment(args.store)
    with shown(asked.timing.get("budget_s")) as progress:
        result = experiment.run(**asked.timing, progress=progress.update)
    result.to_terminal(screen())
    return _finish(result, args)


def status(args: Namespace) -> int:
    """Show the stored experiments: the latest version of each, or all versions and events of one."""
    from ..report.layout import Section, Table
    from ..report.terminal import show

    store = _store(args)
    versions = _versions(store, args.name) if args.name else _latest(store)
    rows = tuple(_row(store, version) for version in versions)
    columns = ("experiment", "version", "mode", "status", "begun", "verdict")
    sections = [Section("Experiments", () if rows else ("None are kept.",), Table(columns, "lrllll", rows))]
    if args.name:
        now = store.verdicts(versions[0]).get("")
        if now and versions[0].mode != "offline":
            sections.append(Section("As last kept", _described(now.body)))
        sections.append(_events(store, versions[0]))
    show(str(store.path), sections, screen())
    return 0


def report(args: Namespace) -> int:
    """Show a stored result again. Its verdict is the exit code."""
    from ..compare.experiment.results import read

    store = _store(args)
    kept = ((v, c) for v in _versions(store, args.name) if (c := store.verdicts(v).get("")))
    version, concluded = next(kept, (None, None))
    if version is None or concluded is None:
        raise ExperimentError(f"experiment {args.name!r} has no result yet; run it to its end")
    if version.mode != "offline":
        return _report_live(store, version, concluded, args)
    result = read(concluded.body)
    if args.json:
        sys.stdout.write(result.to_json())
    elif args.markdown:
        sys.stdout.write(result.to_markdown())
    else:
        result.to_terminal(screen())
    return _finish(result, args)


def _report_live(store: Store, version: Version, concluded: Concluded, args: Namespace) -> int:
    """Show the outcome of a shadow or split experiment: its verdicts and events."""
    from ..report.layout import Section, Table, sentence
    from ..report.markdown import document
    from ..report.terminal import show

    if args.chart:
        raise ExperimentError(f"a {version.mode} experiment has no chart; leave --chart out")
    title = f"Experiment {version.name}, version {version.number} ({version.mode}): {concluded.verdict}"
    arms = tuple((arm, f"{c.verdict}: {c.reason}") for arm, c in store.verdicts(version).items() if arm)
    sections = (
        Section("Verdicts", (sentence(concluded.reason),), Table(("candidate", "verdict"), "ll", arms)),
        _events(store, version),
    )
    if args.json:
        sys.stdout.write(json.dumps(concluded.body, indent=2) + "\n")
    elif args.markdown:
        sys.stdout.write(document(title, sections))
    else:
        show(title, sections, screen())
    return OF_VERDICT[_known(concluded.verdict)]


def _described(body: Mapping[str, Any]) -> tuple[str, ...]:
    from ..compare.experiment.live import describe

    try:
        return tuple(describe(body))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ExperimentError(f"the kept status cannot be shown ({type(error).__name__}: {error})") from error


def _known(verdict: str) -> str:
    if verdict not in OF_VERDICT:
        raise ExperimentError(f"the kept verdict {verdict!r} is none; expected one of {', '.join(OF_VERDICT)}")
    return verdict


def _events(store: Store, version: Version) -> Section:
    from ..report.layout import Section, Table

    events = tuple((event.at, event.kind, event.text) for event in store.events(version))
    return Section(f"Events of version {version.number}", table=Table(("at", "kind", "what"), "lll", events))


def _finish(result: Result, args: Namespace) -> int:
    if args.chart:
        result.chart(args.chart)
    return OF_VERDICT[result.verdict.value]


def _store(args: Namespace) -> Store:
    from ..compare.experiment import Store

    if args.store and (not args.store.exists() or not args.store.stat().st_size):
        raise ExperimentError(
            f"there is no file {args.store} with experiments; run one with --store {args.store} first"
        )
    return Store(args.store)


def _versions(store: Store, name: str) -> tuple[Version, ...]:
    from ..errors import nearest

    found = store.versions(name)
    if not found:
        known = sorted({version.name for version in store.versions()})
        raise ExperimentError(f"there is no experiment {name!r} in {store.path}{nearest(name, known)}")
    return found


def _latest(store: Store) -> tuple[Version, ...]:
    return tuple({version.name: version for version in reversed(store.versions())}.values())


def _row(store: Store, version: Version) -> tuple[str, ...]:
    concluded: Any = store.verdicts(version).get("")
    told = f"{concluded.verdict}: {concluded.reason}" if concluded else ""
    return version.name, str(version.number), version.mode, version.status, version.started, told
