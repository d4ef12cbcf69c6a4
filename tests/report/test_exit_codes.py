"""Whatever it is given, a command ends with a code of its table and one line: never with a traceback, never with 1."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import pytest

from autotune import cli
from autotune.cli import check as check_command
from autotune.cli import tune as tune_command
from autotune.cli.screen import screen
from autotune.errors import MeasurementError
from autotune.report import exit_codes
from autotune.report.exit_codes import Code
from autotune.validate import Verdict
from tests import models

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

BASE = {"model": {"name": "m", "parameters": 1}, "policy": {"name": "p", "objective": "o", "tier": "t"}}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, and files of every kind of wrong."""
    folder = tmp_path_factory.mktemp("stage")
    models.tiny("llama").save_pretrained(folder / "model")
    models.tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "ids.jsonl").write_text("\n".join(json.dumps({"prompt": ids}) for ids in models.token_prompts(24, 8)))
    (folder / "junk").write_bytes(bytes(range(256)) * 40)
    (folder / "empty").write_bytes(b"")
    (folder / "notes.txt").write_text("remember the milk\n")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    for name, text in JSON.items():
        (folder / f"{name}.json").write_text(text)
    with closing(sqlite3.connect(folder / "other.sqlite")) as other:
        other.execute("CREATE TABLE mine (x)")
    (folder / b"\xff\xfe".decode(errors="surrogateescape")).write_text("a name that is no UTF-8")
    (folder / "\x1b[31mred").write_text("a name that a terminal obeys")
    return folder


JSON = {
    "list": "[1]",
    "deep": "[" * 100_000,
    "nan": "NaN",
    "text": '"text"',
    "verdict": '{"verdict": 1}',
    "half": json.dumps({"verdict": "v", **BASE, "phases": {"decode": {}}, "transforms": []}),
    "types": json.dumps({"verdict": "v", **BASE, "phases": [1], "transforms": 3}),
    "plan": json.dumps({"fingerprint": {}, "summary": {"verdict": 3}}),
    "huge": json.dumps({"verdict": 10**400, **BASE, "phases": {}, "transforms": []}),
}
FILES = (
    "missing",
    "",
    "folder",
    "junk",
    "empty",
    "notes.txt",
    "loop",
    "dangling",
    "x" * 300,
    "a/" * 3000,
    "~nobody-of-that-name/x",
    "/dev/null",
    "/proc/self/mem",
    "notes.txt/below",
    "\udcff\udcfe",
    "\x1b[31mred",
    "\x1b]0;owned\x07",
    *(f"{name}.json" for name in JSON),
)
SLOTS = (
    "plan show @",
    "report @",
    "report @ --html page.html",
    "report @ --markdown",
    "policies check @",
    "experiment run @",
    "experiment status --store @",
    "experiment report it --store @",
    "check run model --baseline @",
    "check record @ --out new",
    "check record model --out new --no-latency --tasks @",
    "check record model --out new --no-latency --prompts @",
    "tune @ --out new",
    "tune model --out new --policy @.toml",
    "tune model --out new --prompts @",
    "tune model --out @/below --prompts missing",
    "profile @",
    "profile model --prompts @",
    "profile model --ncu-csv @",
    "profile model --replay decode --prompts @",
)
TEXTS = ("notes.txt", "\udcff\udcfe", "\x1b[31mred", *(f"{name}.json" for name in JSON))


def ended(argv: list[str]) -> int:
    try:
        return cli.main(argv)
    except SystemExit as end:
        return -1 if end.code is None else int(end.code)


def command_of(argv: list[str]) -> str:
    two = " ".join(argv[:2])
    return two if two in exit_codes.COMMANDS else argv[0]


def is_calm(text: str) -> bool:
    return "Traceback" not in text and "unexpected" not in text and "\x1b" not in text and "\x07" not in text


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("slot", SLOTS)
def test_every_file_is_one_line_and_a_documented_code(
    slot: str, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stage)
    before = {file.name: file.read_bytes() for file in stage.iterdir() if file.is_file()}
    wrong = []
    for file in FILES:
        if "--prompts" in slot and file in TEXTS:  # any text is prompts
            continue
        argv = [word.replace("@", file) for word in slot.split()]
        code = ended(argv)
        out, err = capsys.readouterr()
        last = err.splitlines()[-1] if err else ""
        fine = code == Code.USAGE and code in exit_codes.COMMANDS[command_of(argv)]
        if not (fine and last.startswith("autotune") and is_calm(out + err)):
            wrong.append((file[:40], int(code), err[-400:]))
    assert not wrong
    assert {name: (stage / name).read_bytes() for name in before} == before


REFUSED = """
(nothing)
teleport
--teleport
-x
tune
tune model --budget
tune model --budget soon
tune model --budget 0
tune model --budget -5m
tune model --budget=-5m
tune model --budget nan
tune model --budget inf
tune model --budget 1e999
tune model --budget 5d
tune model --budget m
tune model --threads 0
tune model --threads=-1
tune model --threads two
tune model --threads 1.5
tune model --threads 1025
tune model --threads 99999999999999999999
tune model --policy
tune model more
tune model --relase
demo model
demo --release
demo --prompts ids.jsonl
profile
profile model --ncu training
profile model --replay training
profile model --replay
profile model --ncu-csv
profile model --policy balanced
check
check teleport
check record
check record model
check record --out new
check record model --out new --size huge
check record model --out new --lm-eval
check record model --out new --tier strict
check record model --out new --threads 0
check run
check run model
check run --baseline b
check run model --baseline b --tier best
check run model --baseline b --max-slowdown -1
check run model --baseline b --max-slowdown=-1%
check run model --baseline b --max-slowdown x
check run model --baseline b --max-slowdown nan
check run model --baseline b --max-slowdown inf%
check run model --baseline b --plan p.json --policy balanced
check run model --baseline b --force
experiment
experiment teleport
experiment run
experiment run a.toml b.toml
experiment run a.toml --threads 0
experiment run a.toml --json
experiment report
experiment report it --json --markdown
experiment status it --chart c.svg
doctor model
doctor --threads 0
plan
plan show
plan edit plan.json
plan show a b
report
report a b
report --html
policies check
policies check a b
policies edit a
transforms model
transforms --what
"""


@pytest.mark.parametrize("line", REFUSED.strip().splitlines())
def test_what_argparse_refuses_is_usage(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([] if line == "(nothing)" else line.split())
    assert end.value.code == Code.USAGE
    said = capsys.readouterr().err
    assert said.startswith("usage: autotune")
    assert is_calm(said)


def test_what_the_tables_hold_together() -> None:
    assert len(REFUSED.strip().splitlines()) + len(SLOTS) * (len(FILES) - len(TEXTS)) > 300


LATER = [  # what argparse takes, and the command refuses
    ("tune model --policy balancd", "did you mean 'balanced'"),
    ("tune model --policy .", "there is no policy"),
    ("tune model --policy a/b", "cannot be read as TOML"),
    ("tune model --prompts empty", "empty"),
    ("tune model --out notes.txt", "--out"),
    ("check record model --out folder/../notes.txt", "is not a baseline"),
    ("check record model --out model --force", "is not a baseline"),
    ("check record model --out new --prompts ids.jsonl --tasks ids.jsonl", "has no prompt and answer"),
    ("check record model --out new --prompts ids.jsonl --lm-eval gsm8k", "not installed"),
    ("experiment report it --chart c.exe", "there is no experiment"),
    ("policies check ids.jsonl", "cannot be read as TOML"),
    ("profile model --ncu-csv ids.jsonl", "not a CSV"),
    ("report verdict.json --html folder", "the report in it cannot be shown"),
]


@pytest.mark.parametrize(("line", "said"), LATER, ids=[line for line, _ in LATER])
def test_what_a_command_refuses_is_one_line(
    line: str, said: str, stage: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(stage)
    code = cli.main(line.split())
    err = capsys.readouterr().err
    assert code == (Code.UNMEASURED if "installed" in said else Code.USAGE)
    (last,) = [each for each in err.splitlines() if each.startswith("autotune: ")]
    assert said in last
    assert is_calm(err)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("what was that"), Code.UNMEASURED, "unexpected: RuntimeError: what was that; please report it"),
        (AssertionError(), Code.UNMEASURED, "unexpected: AssertionError; please report it"),
        (MemoryError(), Code.UNMEASURED, "unexpected: MemoryError"),
        (RecursionError("deep"), Code.UNMEASURED, "unexpected: RecursionError"),
        (OSError(28, "No space left on device", "f"), Code.UNMEASURED, "No space left on device: 'f'"),
        (OSError(5, "Input/output error"), Code.UNMEASURED, "Input/output error"),
        (PermissionError(13, "Permission denied", "f"), Code.USAGE, "Permission denied: 'f'"),
        (FileNotFoundError(2, "No such file", "f"), Code.USAGE, "No such file: 'f'"),
        (KeyboardInterrupt(), Code.INTERRUPTED, "interrupted"),
    ],
)
@pytest.mark.parametrize("trace", [False, True])
def test_what_nobody_expected_never_ends_with_1(
    error: BaseException,
    code: Code,
    said: str,
    trace: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> int:
        raise error

    monkeypatch.setattr("autotune.cli.show.transforms", fail)
    if trace:
        monkeypatch.setenv(cli.TRACEBACK, "1")
    assert cli.main(["transforms"]) == code
    lines = capsys.readouterr().err.splitlines()
    assert said in lines[-1]
    assert ("Traceback (most recent call last):" in lines) is (trace and "unexpected" in said)
    assert trace or len(lines) == 1


@contextmanager
def full() -> Iterator[TextIO]:
    with open("/dev/full", "w") as stream:
        yield stream


@contextmanager
def unread() -> Iterator[TextIO]:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


@contextmanager
def closed() -> Iterator[None]:
    yield None


@contextmanager
def ascii_only() -> Iterator[TextIO]:
    with TextIOWrapper(BytesIO(), encoding="ascii", errors="strict") as stream:
        yield stream


FAILED = "fail"
STREAMS = {  # stream, exit code of what would have ended with 0, and with 1
    "full": (full, Code.UNMEASURED, Code.REGRESSION),
    "unread": (unread, Code.DONE, Code.REGRESSION),
    "closed": (closed, Code.DONE, Code.REGRESSION),
    "ascii": (ascii_only, Code.DONE, Code.REGRESSION),
}


@pytest.fixture
def printing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    def lots(file: Path) -> int:
        sys.stdout.write("→ \x1b[1mé\x1b[0m " * 100_000)
        screen().print("→" * 100_000)
        return Code.REGRESSION if str(file) == FAILED else Code.DONE

    monkeypatch.setattr("autotune.cli.show.plan", lots)
    return lambda line: ended(line.split())


@pytest.mark.parametrize(("open_", "done", "regression"), STREAMS.values(), ids=STREAMS.keys())
@pytest.mark.parametrize(
    "line", ["transforms", "policies", "experiment status", "--help", "check run --help", "plan show x"]
)
def test_standard_output_that_cannot_be_written(
    line: str,
    open_: Callable[[], AbstractContextManager[TextIO | None]],
    done: Code,
    regression: Code,
    printing: Callable[[str], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with open_() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert printing(line) == done
        assert printing(f"plan show {FAILED}") == regression
        assert sys.stdout is stream
    err = capsys.readouterr().err
    assert ("cannot be written: No space left on device" in err) is (done == Code.UNMEASURED)
    assert "Traceback" not in err


@pytest.mark.parametrize("open_", [full, unread, closed])
def test_standard_error_that_cannot_be_written_changes_nothing(
    open_: Callable[[], AbstractContextManager[TextIO | None]], stage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(stage)
    with open_() as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        assert ended(["plan", "show", "missing"]) == Code.USAGE
        assert ended(["tune", "model", "--budget", "soon"]) == Code.USAGE
        argv = ["check", "record", "model", "--no-latency", "--prompts", "ids.jsonl", "--out"]
        assert ended([*argv, f"new-{open_.__name__}"]) == Code.DONE


@pytest.mark.parametrize(("ending", "code"), [("> /dev/full", Code.UNMEASURED), ("| true", Code.DONE)])
def test_as_a_process(ending: str, code: Code) -> None:
    """The interpreter flushes once more as it ends, and would end with 120."""
    script = f"{sys.executable} -m autotune transforms {ending}; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.strip() == str(int(code))
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_files_that_cannot_be_written_are_said(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(stage)
    with pytest.raises(MeasurementError, match="cannot be written: No space left on device"):
        check_command._write(Path("/dev/full"), "x" * 100_000)
    with pytest.raises(MeasurementError, match="cannot be written: No space left on device"):
        tune_command._write(Path("/dev/full"), "x" * 100_000)


@pytest.mark.parametrize("command", exit_codes.COMMANDS)
def test_the_help_of_every_command_shows_its_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert end.value.code == Code.DONE
    said = " ".join(capsys.readouterr().out.split())
    for code, meaning in exit_codes.COMMANDS[command].items():
        assert f"{code}: {meaning}"[:60] in said


def test_every_command_is_in_the_table() -> None:
    def leaves(parser: ArgumentParser, words: tuple[str, ...]) -> Iterator[str]:
        below = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
        if words and (not below or words == ("policies",)):
            yield " ".join(words)
        for choices in below:
            for name, inner in choices.items():
                yield from leaves(inner, (*words, name))

    assert set(leaves(cli.parser(), ())) == set(exit_codes.COMMANDS)


def test_only_verdicts_end_with_1_or_2() -> None:
    judged = {command for command, meanings in exit_codes.COMMANDS.items() if Code.REGRESSION in meanings}
    assert judged == {"check run", "experiment run", "plan-capacity", "experiment report"}
    assert {v.value: EXIT for v, EXIT in zip(Verdict, (0, 1, 2, 3), strict=True)} == exit_codes.OF_VERDICT
