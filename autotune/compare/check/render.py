"""Renders a check's result as Markdown and as JUnit XML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from ...report.markdown import escape
from ...validate import Verdict

if TYPE_CHECKING:
    from .localise import Localised
    from .values import Checked

ELEMENTS = {Verdict.FAIL: "failure", Verdict.ERROR: "error", Verdict.INCONCLUSIVE: "skipped"}
FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, section 2.2
SHOWN_FLIPS = 20


def markdown(result: Checked) -> str:
    """Render the whole result as one Markdown document."""
    title = f"# {result.verdict.value.upper()}: {result.model} against {result.baseline}"
    rows = [
        (m.name, m.verdict.value, number(m.recorded), number(m.value), number(m.bound), number(m.limit), m.reason)
        for m in result.metrics
    ]
    columns = ("metric", "verdict", "recorded", "now", "95 % bound", "limit", "reason")
    parts = [escape(title).replace("\\#", "#"), escape(result.reason), table(columns, rows)]
    if result.localised is not None:
        parts += _localised(result.localised)
    for name, flips in result.flips.items():
        parts.append(f"## {escape(name)}")
        parts += [
            escape(f"{what} ({len(ids)}): {', '.join(ids[:SHOWN_FLIPS])}{' ...' if len(ids) > SHOWN_FLIPS else ''}")
            for what, ids in (("Lost", flips.lost), ("Won", flips.won))
            if ids
        ]
    return "\n\n".join(parts) + "\n"


def _localised(found: Localised) -> list[str]:
    parts = ["## Where it differs", escape(found.summary)]
    layers = [(shift.name, number(shift.deviation)) for shift in found.worst_layers]
    prompts = [(str(p.prompt), number(p.mean_kld), str(p.tokens), p.text) for p in found.prompts]
    sure = [
        (f"{c.low:g} to {c.high:g}", str(c.tokens), number(c.p50_kld), number(c.p99_kld), f"{c.same_top:.1%}")
        for c in found.certainty
    ]
    tables: tuple[tuple[tuple[str, ...], Sequence[Sequence[str]]], ...] = (
        (("layer", "deviation"), layers),
        (("prompt", "mean KLD", "tokens", "its end"), prompts),
        (("recorded top probability", "tokens", "median KLD", "p99 KLD", "same top token"), sure),
    )
    parts += [table(columns, rows) for columns, rows in tables if rows]
    return parts


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float) -> str:
    if math.isinf(value):
        return "infinite"
    return "" if math.isnan(value) else f"{value:.4g}"


def junit(result: Checked) -> str:
    """Render JUnit XML. Inconclusive metrics are skipped cases, with their reason."""
    count = {verdict: sum(m.verdict is verdict for m in result.metrics) for verdict in Verdict}
    suite = Xml.Element(
        "testsuite",
        name="autotune check",
        tests=str(len(result.metrics)),
        failures=str(count[Verdict.FAIL]),
        errors=str(count[Verdict.ERROR]),
        skipped=str(count[Verdict.INCONCLUSIVE]),
        timestamp=result.created,
    )
    for metric in result.metrics:
        case = Xml.SubElement(suite, "testcase", classname=clean(f"autotune.{result.tier}"), name=clean(metric.name))
        if element := ELEMENTS.get(metric.verdict):
            said = Xml.SubElement(case, element, message=clean(metric.reason))
            if metric.verdict is Verdict.FAIL and result.localised is not None:
                said.text = clean(result.localised.summary)
    suites = Xml.Element("testsuites")
    suites.append(suite)
    Xml.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + Xml.tostring(suites, encoding="unicode") + "\n"


def clean(text: str) -> str:
    """Replace characters that XML forbids."""
    return FORBIDDEN.sub("\ufffd", text)
