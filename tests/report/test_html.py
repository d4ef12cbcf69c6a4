"""The page: whole, true to its data, deaf to markup in names, at home on phones and in the dark."""

from __future__ import annotations

import functools
import json
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from autotune import cli
from autotune.cli.tune import _hand_over
from autotune.errors import PackageError
from autotune.report import Report
from autotune.report import numbers as n
from autotune.report.html import drawing, elements, roofline, samples, steps
from autotune.tune import plan
from autotune.tune.fingerprint import Fingerprint
from autotune.tune.plan import Plan
from autotune.tune.record import report_of, reverified
from autotune.validate import BucketTimes, ConfidenceBin, Latency, Speedup, Verdict
from tests import chromium, pages
from tests.report.test_report import CALLED, COMMITTED, FASTER, NAN, ORIGINAL, PASSED, PROFILED
from tests.report.test_report_device import DOUBTED, MEASURED
from tests.report.test_report_device import TUNED as ON_GPU

SURE = (
    ConfidenceBin(0.0, 0.5, 12, 0.001, 0.004, 0.02, 0.05, 0.9),
    ConfidenceBin(0.5, 0.9, 40, 1e-4, 1e-3, 0.004, 0.01, 0.98),
    ConfidenceBin(0.9, 1.0, 300, 0.0, 2e-5, 3e-4, 0.002, 1.0),
)
PAIRS = 6
WAIT_S = 60.0
METRICS = ("ttft", "tpot", "end_to_end")
SHAPES = ("b1/p64/n32", "b4/p64/n32")
TIMED = replace(
    FASTER,
    buckets={
        name: BucketTimes(
            {"ttft": FASTER.ttft, "tpot": FASTER.tpot, "end_to_end": FASTER.end_to_end},
            {m: tuple(0.03 + 0.001 * (k + PAIRS * i) for k in range(PAIRS)) for m in METRICS},
            {m: tuple(0.012 + 0.0005 * (k + PAIRS * i) for k in range(PAIRS)) for m in METRICS},
        )
        for i, name in enumerate(SHAPES)
    },
)
WHOLE = replace(COMMITTED, quality=replace(PASSED, certainty=SURE), latency=TIMED)
FULL = report_of(WHOLE).with_calls(0, {"beam search": 3})
UNKNOWN = Speedup(NAN, NAN, NAN, 0)
UNTIMED = Latency(Verdict.ERROR, "", UNKNOWN, UNKNOWN, UNKNOWN, NAN)
NEW = {"certainty", "samples", "flops", "moved_bytes", "after_flops", "after_moved_bytes", "roofline_share"}
NEW |= {"ttft", "tpot"}  # of a trial
LATER = {"device", "ncu", "bytes_after_release", "doubt", "advice", "contributions", "elsewhere"}


def old(record: Any, *, trial: bool = False) -> Any:
    """A record as an earlier version wrote it."""
    if isinstance(record, list):
        return [old(item, trial=trial) for item in record]
    if not isinstance(record, dict):
        return record
    gone = NEW - (set() if trial else {"ttft", "tpot"})
    return {key: old(value, trial=key == "trials") for key, value in record.items() if key not in gone}


def lean(record: dict[str, Any]) -> dict[str, Any]:
    """Without what takes long to draw and is in other records."""
    return record | {"operators": {}, "batch_scaling": [], "context_growth": []}


RECORDS: dict[str, dict[str, Any]] = {
    "committed": FULL.to_dict(),
    "kept": report_of(ORIGINAL).to_dict(),
    "profiled": report_of(PROFILED).to_dict(),
    "replayed": reverified(Report(lean(FULL.to_dict())), verdict="Replayed.", seconds=12.0, latency=TIMED).to_dict(),
    "released": Report(lean(CALLED.to_dict())).without_original(148_500_000).to_dict(),
    "device": report_of(replace(ON_GPU, latency=TIMED)).to_dict(),
    "device, profiled": lean(report_of(MEASURED).to_dict()),
    "counted": lean(report_of(DOUBTED).to_dict()),
    "unpaired": lean(report_of(replace(COMMITTED, latency=None, quality=None)).to_dict()),
    "untimed": lean(
        report_of(replace(COMMITTED, latency=Latency(Verdict.ERROR, "", UNKNOWN, UNKNOWN, UNKNOWN, NAN))).to_dict()
    ),
    "old": {key: value for key, value in old(FULL.to_dict()).items() if key not in LATER},
    "bare": lean(report_of(PROFILED).to_dict()),
}
EVERY = pytest.mark.parametrize("kind", list(RECORDS))


@functools.cache
def written(kind: str) -> str:
    return Report(RECORDS[kind]).to_html()


@functools.cache
def page(kind: str) -> pages.Node:
    return pages.parse(written(kind))


@EVERY
def test_every_record_makes_a_whole_page(kind: str) -> None:
    found = page(kind)
    ids = [node.attributes["id"] for node in found.all() if "id" in node.attributes]
    assert len(set(ids)) == len(ids)
    assert {href[1:] for href in found.urls() if href.startswith("#")} <= set(ids)
    sections = [node.attributes["id"] for node in found.all("section")]
    assert [a.attributes["href"] for a in found.one("nav").all("a")] == [f"#{name}" for name in sections]
    assert {"limits", "memory", "method"} <= set(sections)
    assert [node.tag for node in found.all("h1")] == ["h1"]
    assert all(svg.attributes["aria-label"] for svg in found.all("svg"))
    assert not re.search(r"\bnan\b|\binf\b|None", found.one("body").text)


@EVERY
def test_a_page_stands_alone_and_runs_nothing(kind: str) -> None:
    found = page(kind)
    assert [url for url in found.urls() if not str(url).startswith(("#", "data:"))] == []
    assert not re.search(r"https?://", written(kind))
    assert found.all("script") == []
    policy = found.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert "default-src 'none'" in policy
    assert "script-src" not in policy


@EVERY
def test_the_data_goes_with_the_page(kind: str) -> None:
    assert page(kind).data() == json.loads(json.dumps(RECORDS[kind]))


def test_the_same_record_is_the_same_page() -> None:
    assert Report(json.loads(json.dumps(RECORDS["released"]))).to_html() == written("released")


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        ("committed", {"device"}),
        ("kept", {"steps", "latency", "quality", "device", "bypassed"}),
        ("profiled", {"steps", "trials", "latency", "quality", "device", "bypassed"}),
        ("device", {"bypassed"}),
        ("bare", {"steps", "trials", "latency", "quality", "operators", "growth", "device", "bypassed"}),
    ],
)
def test_what_was_not_measured_has_no_chapter(kind: str, absent: set[str]) -> None:
    known = {"limits", "steps", "trials", "latency", "quality", "operators", "growth", "memory", "device", "bypassed"}
    assert known - {node.attributes["id"] for node in page(kind).all("section")} == absent


@pytest.mark.parametrize(
    ("kind", "badge", "said"),
    [
        ("committed", "tuned", ["2.20x", "2.10-2.30x", "0.0017 nat", "98.1 %", "strict"]),
        ("replayed", "replayed", ["2.20x as fast"]),
        ("kept", "original kept", ["Kept the original: no candidate passed."]),
        ("profiled", "profiled", ["Profiled; nothing was tried."]),
        ("unpaired", "tuned", ["Committed shrink(bits=8)@decode."]),
    ],
)
def test_the_verdict_comes_first_with_its_numbers(kind: str, badge: str, said: list[str]) -> None:
    lead = page(kind).one("header").one(class_="lead")
    assert lead.all("span")[0].text == badge
    assert [text for text in said if text not in lead.text] == []
    record, figures = RECORDS[kind], [tile.text for tile in page(kind).one("header").all(class_="figure")]
    assert figures[:2] == [f"{n.milliseconds(record['phases'][p]['final_ms'])} ms" for p in ("decode", "prefill")]


def test_the_steps_are_those_accepted() -> None:
    record = RECORDS["committed"]
    decode, accepted = record["phases"]["decode"], record["trials"][0]
    now = decode["baseline_ms"]
    after = now / accepted["tpot"]["ratio"]
    assert page("committed").rows("Accepted steps")[:3] == [
        ["decode", "original", n.milliseconds(now), ""],
        ["decode", accepted["candidate"], n.milliseconds(after), n.ratio(now / after)],
        ["decode", "the whole plan", n.milliseconds(decode["final_ms"]), ""],
    ]
    earlier = steps.steps(RECORDS["old"], "decode")
    assert [step.after_ms for step in earlier] == pytest.approx([now, after, decode["final_ms"]])


def test_bars_are_as_long_as_their_figures() -> None:
    drawn = page("committed").one("section", id="steps").all("svg")[0]
    lengths = {}
    for group in drawn.all("g"):
        titles = [child for child in group.children if isinstance(child, pages.Node) and child.tag == "title"]
        if titles:
            x = [float(pair.split()[1]) for pair in re.findall(r"[ML] \S+", group.one("path").attributes["d"])]
            lengths[titles[0].text.partition(":")[0]] = max(x) - min(x)
    decode = RECORDS["committed"]["phases"]["decode"]
    assert {"original", "the whole plan", "shrink(bits=8)@decode"} <= set(lengths)
    prefill = RECORDS["committed"]["phases"]["prefill"]
    assert lengths["original"] / lengths["the whole plan"] == pytest.approx(
        prefill["baseline_ms"] / prefill["final_ms"], rel=1e-4
    )
    assert decode["final_ms"] < decode["baseline_ms"]


@pytest.mark.parametrize("kind", ["committed", "kept", "device"])
def test_the_roofline_is_that_of_the_operators(kind: str) -> None:
    record, listed = RECORDS[kind], page(kind).rows("Roofline of every part")
    rows = record["operators"]["decode"]
    first = rows[0]
    expected = [
        "decode",
        first["group"],
        "original",
        n.milliseconds(first["before_ms"]),
        n.significant(first["flops"] / first["moved_bytes"]),
        n.scaled(1e3 * first["flops"] / first["before_ms"], "FLOP/s"),
        n.scaled(1e3 * first["moved_bytes"] / first["before_ms"], "B/s"),
    ]
    assert expected in listed
    states = 2 if record["transforms"] else 1
    assert len(listed) == 2 * states * (len(rows) + 1)  # and the whole phase
    (whole,) = [mark for mark in roofline.marks(rows, "before") if mark.group == roofline.WHOLE]
    assert whole.flops_per_s == pytest.approx(1e3 * sum(r["flops"] for r in rows) / sum(r["before_ms"] for r in rows))


def test_every_trial_is_listed_with_its_reason() -> None:
    record = RECORDS["committed"]
    listed = page("committed").rows("Everything that was considered")
    assert [row[0] for row in listed] == [trial["candidate"] for trial in record["trials"]]
    for row, trial in zip(listed, record["trials"], strict=True):
        assert row[1:3] == [n.ratio(trial["predicted"]), n.ratio(trial["speedup"])]
        assert row[-1] == f"{trial['outcome']} {trial['reason']}"
    choices = [label.text for label in page("committed").all("label")]
    assert choices == ["called for 2", "accepted 1", "rejected 1", "skipped 1", "unavailable 1", "all 4"]


def test_every_sample_is_there_in_its_bucket() -> None:
    listed = page("committed").rows("All samples, ms")
    assert len(listed) == 3 * 2 * PAIRS
    taken = RECORDS["committed"]["latency"]["samples"][SHAPES[1]]
    second = [row for row in listed if row[0] == f"per token, {SHAPES[1]}"]
    before, after = taken["reference_ms"]["tpot"], taken["candidate_ms"]["tpot"]
    assert [row[2:] for row in second] == [
        [n.milliseconds(a), n.milliseconds(b), n.ratio(a / b)] for a, b in zip(before, after, strict=True)
    ]
    assert all(not race.pairs for race in samples.races(RECORDS["old"]["latency"]))


def test_samples_of_all_buckets_in_one_row_are_read_as_earlier_versions_wrote_them() -> None:
    now = RECORDS["committed"]["latency"]
    rows = {
        arm: {m: [s for name in SHAPES for s in now["samples"][name][arm][m]] for m in METRICS} for arm in samples.ARMS
    }
    assert samples.races(now | {"samples": rows}) == samples.races(now)


def test_quality_is_shown_by_how_sure_the_original_was() -> None:
    listed = page("committed").rows("KL divergence by confidence, nat")
    assert [row[0] for row in listed] == ["unsure (below 50 %)", "likely (50 % to 90 %)", "sure (over 90 %)"]
    assert [row[1] for row in listed] == [str(part.tokens) for part in SURE]
    assert listed[2][2:] == [*(n.divergence(nat) for nat in (0.0, 2e-5, 3e-4, 0.002)), "100.0 %"]


def test_growth_and_memory_are_the_records() -> None:
    record = RECORDS["committed"]
    listed = page("committed").rows("Decode by batch size")
    assert [row[0] for row in listed] == [str(point["batch"]) for point in record["batch_scaling"]]
    assert [row[4] for row in listed] == [n.milliseconds(p["after_tokens_per_s"]) for p in record["batch_scaling"]]
    weights = page("committed").rows("Memory")[0]
    assert weights[1:3] == [n.scaled(record["memory"][state]["weights_bytes"], "B") for state in ("before", "after")]


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&lt;b&gt; </svg></style>"
HOSTILE += "$x_{1}$ \u202e \x00\x1b[31m \ud800"
HARMLESS = {"html", "head", "meta", "link", "title", "style", "body", "header", "nav", "main", "section", "footer"}
HARMLESS |= {"a", "h1", "h2", "h3", "p", "div", "span", "strong", "code", "wbr", "ol", "li", "i", "details", "summary"}
HARMLESS |= {"figure", "figcaption", "table", "caption", "thead", "tbody", "tr", "th", "td"}
HARMLESS |= {"fieldset", "legend", "label", "input", "svg", "g", "path", "text", "use", "defs", "clippath", "rect"}


def spoiled(value: Any, key: str = "") -> Any:
    """The record with every text, and every name a user could choose, replaced."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    if isinstance(value, dict):
        named = key in {"versions", "flops_per_s", "bypassed", "strata", "buckets", "unavailable"}
        return {f"{HOSTILE}{name}" if named else name: spoiled(item, name) for name, item in value.items()}
    return value


@pytest.mark.parametrize("kind", ["committed", "device", "counted"])
def test_no_text_becomes_markup(kind: str) -> None:
    text = Report(spoiled(RECORDS[kind])).to_html()
    found = pages.parse(text)
    assert {node.tag for node in found.all()} <= HARMLESS
    names = {name for node in found.all() for name in node.attributes}
    assert [name for name in names if name.startswith("on")] == []
    assert [url for url in found.urls() if not str(url).startswith(("#", "data:"))] == []
    assert "<script>alert(1)</script>" in found.one("h1").text
    assert not elements.UNPRINTABLE.search(found.text)
    text.encode()


@pytest.mark.parametrize(
    ("found", "markup"),
    [
        (elements.element("p", "a < b"), "<p>a &lt; b</p>"),
        (elements.element("p", elements.element("b", "x"), " & y"), "<p><b>x</b> &amp; y</p>"),
        (
            elements.element("a", "x", href='"><b>', class_="c", title=None),
            '<a href="&quot;&gt;&lt;b&gt;" class="c">x</a>',
        ),
        (elements.element("input", value="1"), '<input value="1">'),
        (elements.code("f(a=1)@x"), "<code>f(<wbr>a=<wbr>1)@<wbr>x</code>"),
        (elements.badge("pass"), '<span class="badge good">pass</span>'),
        (elements.badge("<x>"), '<span class="badge">&lt;x&gt;</span>'),
    ],
)
def test_elements(found: str, markup: str) -> None:
    assert found == markup


@pytest.mark.parametrize(
    ("peaks", "roofs"),
    [
        ({"float32": 4e11, "bfloat16": 2e12}, ["float32 400 GFLOP/s", "bfloat16 2.00 TFLOP/s"]),
        ({"float32": 4e11, "float16": 3.8e11}, ["float16, float32 400 GFLOP/s"]),
        ({}, []),
    ],
)
def test_roofs_too_close_to_tell_apart_share_a_label(peaks: dict[str, float], roofs: list[str]) -> None:
    assert [name for name, _ in roofline._roofs(peaks)] == roofs


class Asked:
    """A lock that says when a second one asks for it."""

    def __init__(self, lock: Any, second: threading.Event) -> None:
        self._lock = lock
        self._second = second

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self._second.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def test_two_reports_that_are_drawn_at_once_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one comes while the first is drawn, and draws when that is done. Settings are the whole process's."""
    begun, came, left = threading.Event(), threading.Event(), threading.Event()
    sizes = list[float]()
    monkeypatch.setattr(drawing, "_settings", Asked(drawing._settings, came))

    def first(*_: Any) -> None:
        begun.set()
        assert came.wait(WAIT_S)

    def second(*_: Any) -> None:
        came.set()
        assert left.wait(WAIT_S)
        sizes.append(matplotlib.rcParams["font.size"])

    def draw_first() -> None:
        drawing._svg(first, "first", "wide", 50)
        left.set()

    def draw_second() -> None:
        assert begun.wait(WAIT_S)
        drawing._svg(second, "second", "wide", 50)

    before, filters = dict(matplotlib.rcParams), list(warnings.filters)
    threads = [threading.Thread(target=draw) for draw in (draw_first, draw_second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [drawing.TEXT]
    assert dict(matplotlib.rcParams) == before
    assert warnings.filters == filters


# the command line


@pytest.fixture
def report_file(tmp_path: Path) -> Path:
    file = tmp_path / "report.json"
    file.write_text(json.dumps(RECORDS["released"]), encoding="utf-8")
    return file


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    print_ = Fingerprint("m", "h", {}, "w", "p", "strict")
    file = tmp_path / "plan.json"
    file.write_text(plan.dumps(Plan(print_, (), summary=RECORDS["released"])), encoding="utf-8")
    return file


@pytest.mark.parametrize("source", ["report_file", "plan_file"])
def test_a_file_is_shown_in_every_form(source: str, request: Any, tmp_path: Path, capsys: Any) -> None:
    file = request.getfixturevalue(source)
    assert cli.main(["report", str(file)]) == cli.DONE
    assert "Committed shrink(bits=8)@decode." in capsys.readouterr().out
    assert cli.main(["report", str(file), "--markdown"]) == cli.DONE
    assert capsys.readouterr().out == Report(RECORDS["released"]).to_markdown()
    assert cli.main(["report", str(file), "--html"]) == cli.DONE
    beside = file.with_suffix(".html")
    assert str(beside) in "".join(capsys.readouterr().out.split("\n"))
    assert cli.main(["report", str(file), "--html", str(tmp_path / "other.html")]) == cli.DONE
    assert beside.read_text() == (tmp_path / "other.html").read_text() == written("released")


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, [], "cannot be read"),
        ("{", [], "is not JSON"),
        ("[" * 100_000, [], "is not JSON"),
        ("[]", [], "holds no report"),
        ('{"fingerprint": {}, "summary": {}}', [], "holds no report"),
        ('{"verdict": "x"}', [], "cannot be shown"),
        (
            json.dumps(CALLED.to_dict() | {"operators": {"decode": [{"group": 1}]}}),
            ["--html"],
            "cannot be",
        ),
        (json.dumps(RECORDS["bare"]), ["--html", "no/such/folder/x.html"], "cannot be written"),
    ],
    ids=["missing", "broken", "deep", "list", "empty plan", "no report", "spoiled", "nowhere"],
)
def test_what_is_no_report_is_a_usage_error(
    text: str | None, options: list[str], said: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    assert cli.main(["report", str(file), *options]) == cli.USAGE
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.fixture
def without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.mark.usefixtures("without_matplotlib")
def test_the_missing_library_is_named(report_file: Path, capsys: Any) -> None:
    with pytest.raises(PackageError, match=r"pip install 'matplotlib>="):
        CALLED.to_html()
    assert cli.main(["report", str(report_file), "--html"]) == cli.USAGE
    assert "pip install" in capsys.readouterr().err
    assert not report_file.with_suffix(".html").exists()


@pytest.mark.usefixtures("without_matplotlib")
def test_tuning_leaves_the_page_out_and_says_so(tmp_path: Path, capsys: Any) -> None:
    _hand_over(CALLED, tmp_path, "report", {"plan.json": "{}"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "report.json", "report.md"]
    assert "No report.html" in capsys.readouterr().out


def test_tuning_writes_the_page(tmp_path: Path, capsys: Any) -> None:
    _hand_over(Report(RECORDS["released"]), tmp_path, "report", {})
    assert (tmp_path / "report.html").read_text() == written("released")
    assert "report.html" in capsys.readouterr().out.splitlines()[-1]


# in a browser

needs_chromium = pytest.mark.skipif(chromium.executable() is None, reason="no Chromium on the path")

LOOK = """(() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, k) => sum + c * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = node => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const shown = node => node.getClientRects().length > 0 && !node.closest('.unseen');
  const texts = [...document.querySelectorAll('body *')].filter(node => shown(node) &&
    [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim()) &&
    !['TITLE', 'title', 'STYLE'].includes(node.tagName));
  const contrast = node => {
    const style = getComputedStyle(node);
    const [a, b] = [rgb(node.tagName === 'text' ? style.fill : style.color), behind(node)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const poor = texts.filter(node => contrast(node) < 4.5).map(node => node.textContent.trim().slice(0, 40));
  const charts = [...document.querySelectorAll('svg')].filter(shown);
  const boxes = svg => [...svg.querySelectorAll('text')].map(node => [node.textContent, node.getBoundingClientRect()]);
  const outside = charts.flatMap(svg => {
    const room = svg.getBoundingClientRect();
    return boxes(svg).filter(([, b]) => b.left < room.left - 2 || b.right > room.right + 2 || b.top < room.top - 2 ||
      b.bottom > room.bottom + 2).map(([text]) => text);
  });
  const small = texts.filter(node => node.getBoundingClientRect().height < 7).map(node => node.textContent);
  return {
    texts: texts.length, charts: charts.length, poor, outside, small,
    page: light(behind(document.querySelector('main p'))),
    wide: document.scrollingElement.scrollWidth, room: innerWidth,
    rows: [...document.querySelectorAll('.trials tbody tr')].filter(shown).length,
  };
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    with chromium.browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def shown(tmp_path: Path) -> Any:
    def write(kind: str) -> Path:
        file = tmp_path / "page.html"
        file.write_text(written(kind), encoding="utf-8")
        return file

    return write


@needs_chromium
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", ["committed", "kept", "device", "old"])
def test_a_browser_shows_it_well(tab: chromium.Page, shown: Any, kind: str, width: int, dark: bool) -> None:
    file = shown(kind)
    tab.open(file, width, dark=dark)
    found = tab.evaluate(LOOK)
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith("data:")] == [file.as_uri()]
    assert found["wide"] <= found["room"] == width
    assert (found["page"] < 0.1) is dark
    assert found["texts"] > 50
    assert (found["poor"], found["outside"], found["small"]) == ([], [], [])
    assert found["charts"] == len(page(kind).all("svg")) / 2  # each is drawn for wide and for narrow


@needs_chromium
def test_the_filters_work_without_a_script(tab: chromium.Page, shown: Any) -> None:
    tab.open(shown("committed"), 1280)
    rows = {}
    for choice in ("ran", "rejected", "unavailable", "all"):
        tab.evaluate(f"document.querySelector('.trials [value={choice}]').click()")
        rows[choice] = tab.evaluate(LOOK)["rows"]
    assert rows == {"ran": 2, "rejected": 1, "unavailable": 1, "all": 4}


@needs_chromium
def test_a_hostile_page_runs_nothing(tab: chromium.Page, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text(Report(spoiled(RECORDS["committed"])).to_html(), encoding="utf-8")
    tab.open(file, 360)
    assert tab.said == []
    assert [url for url in tab.asked if not url.startswith("data:")] == [file.as_uri()]
    assert tab.evaluate("document.scripts.length + document.images.length") == 0
    assert tab.evaluate(LOOK)["wide"] <= 360
