"""What comes from files is shown by the terminal, never obeyed."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from autotune import cli
from autotune.compare.experiment import Store
from autotune.report import markdown, progress, terminal
from autotune.report.layout import Section, Table
from autotune.report.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

EVIL = "a\x1b]0;owned\x07b\x1b[31mc\x9b2Jd\re\x08f\u202eg\x7f\ud800h"
OBEYED = "\x1b\x07\x9b\r\x08\u202e\x7f\ud800"


def calm(text: str) -> bool:
    return not set(OBEYED) & set(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("über 東京 🙂\tx\ny", "über 東京 🙂\tx\ny"),
        ("עברית עם‏ סימן", "עברית עם‏ סימן"),
        ("\x1b[31mred", "\ufffd[31mred"),
        ("\x9b31mred", "\ufffd31mred"),
        ("a\rb", "a\ufffdb"),
        ("a\x00b", "a\ufffdb"),
        ("a\u202eb\u2066c", "a\ufffdb\ufffdc"),
        ("\udcff", "\ufffd"),
        (7, "7"),
    ],
)
def test_printable(text: object, shown: str) -> None:
    assert printable(text) == shown
    assert printable(printable(text)) == shown


def hostile(value: Any) -> Any:
    """The same with every text, keys apart, made hostile."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


def test_sections_however_they_are_drawn() -> None:
    table = Table((EVIL, "b"), "lr", ((EVIL, EVIL), (EVIL, EVIL)), total=True)
    sections = [Section(EVIL, (EVIL,), table)]
    out = io.StringIO()
    terminal.show(EVIL, sections, Console(file=out, width=200))
    for text in (out.getvalue(), terminal.text(EVIL, sections), markdown.document(EVIL, sections)):
        assert calm(text)
        assert "owned" in text


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def a_report(folder: Path) -> list[list[str]]:
    record: dict[str, Any] = {
        "verdict": "kept the original",
        "model": {"name": "m", "parameters": 10},
        "policy": {"name": "p", "objective": "o", "tier": "t"},
        "phases": {},
        "transforms": [],
        "created": "now",
        "replayed": None,
        "seconds": 1.0,
        "trials": [],
    }
    (folder / "r.json").write_text(json.dumps(hostile(record)))
    return [["report", "r.json"], ["report", "r.json", "--markdown"]]


def an_experiment(folder: Path) -> list[list[str]]:
    store = Store(folder / "kept.sqlite")
    name = EVIL.replace("\ud800", "")  # SQLite keeps no halves of characters
    arm = {"name": name, "description": name, "verdict": name, "share": 0.1, "reason": name}
    arm |= {key: [name] for key in ("findings", "bounds", "errors")}
    live_body = {
        "name": name,
        "mode": name,
        "state": name,
        "requests": name,
        "counts": {name: name},
        "candidates": [arm],
    }
    for mode in ("offline", "shadow"):
        version = store.begin(f"{mode}{name}", mode, {"control": "f", name: "f"}, {})
        store.note(version, name, name)
        store.conclude(version, name, "fail", name, {})
        store.conclude(version, "", "fail", name, live_body)
    store.close()
    at = ["--store", "kept.sqlite"]
    live = ["experiment", "report", f"shadow{name}", *at]
    return [
        ["experiment", "status", *at],
        ["experiment", "status", f"shadow{name}", *at],
        ["experiment", "status", "none", *at],
        ["experiment", "report", f"offline{name}", *at],
        live,
        [*live, "--json"],
        [*live, "--markdown"],
    ]


def a_policy(folder: Path) -> list[list[str]]:
    said = json.dumps(EVIL.replace("\ud800", ""))
    step = f'name = {said}\nwhen = {{ phase = "decode" }}\nchoices = [{{ transform = "lean_loop", phase = "decode" }}]'
    head = f'name = "p"\ndescription = {said}\nobjective = "latency"\ntier = "strict"\nbudget_s = 9'
    (folder / "p.toml").write_text(f"{head}\n[[steps]]\n{step}\n")
    (folder / "q.toml").write_text(f'name = "q"\n{said} = 1\n')
    return [["policies"], ["policies", "check", "q.toml"], ["tune", "m", "--policy", f"p{EVIL}"]]


def a_name(folder: Path) -> list[list[str]]:
    name = EVIL.replace("\ud800", "")
    (folder / name).write_text("x")
    return [["plan", "show", name], ["report", name], ["tune", name], ["profile", f"{name}.gguf"], ["doctor", name]]


@pytest.mark.parametrize("make", [a_report, an_experiment, a_policy, a_name])
def test_whatever_a_command_prints(
    make: Callable[[Path], list[list[str]]],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AUTOTUNE_POLICY_DIR", str(folder))
    for argv in make(folder):
        with contextlib.suppress(SystemExit):
            cli.main(argv)
        out, err = capsys.readouterr()
        assert "own" in out + err or argv[0] == "report" or "none" in argv, argv
        assert calm(out), argv
        assert calm(err), argv
        assert "unexpected" not in err, argv


def test_what_the_library_says_meanwhile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said() -> int:
        logging.getLogger("autotune.tune.store").warning("the plan %s is ignored", EVIL)
        sys.stderr.write(
            warnings.formatwarning(f"autotune: {EVIL}", RuntimeWarning, __file__, 1)
        )  # pytest keeps others
        return 0

    monkeypatch.setattr("autotune.cli.show.transforms", said)
    monkeypatch.setattr(logging.getLogger("autotune"), "propagate", False)  # pytest cannot send a report with it
    assert cli.main(["transforms"]) == cli.DONE
    err = capsys.readouterr().err
    assert err.count("owned") == 2
    assert calm(err)


def test_progress() -> None:
    out = io.StringIO()
    progress.Lines(out, progress.Elapsed()).update(EVIL)
    console = Console(file=out, force_terminal=False)
    live = progress.Live(console, progress.Elapsed())
    live.update(EVIL)
    console.print(live)
    live.finish()
    assert calm(out.getvalue())
    assert out.getvalue().count("owned") == 3
