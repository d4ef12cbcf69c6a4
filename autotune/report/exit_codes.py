"""The table of each command's exit codes. The help and docs/guide.md show it, and tests check it."""

from __future__ import annotations

import enum
from collections.abc import Mapping


class Code(enum.IntEnum):
    """An exit code of a command's process."""

    DONE = 0
    REGRESSION = 1
    INCONCLUSIVE = 2
    UNMEASURED = 3
    USAGE = 4
    INTERRUPTED = 130


OF_VERDICT = {  # exit code by the text of `validate.Verdict`
    "pass": Code.DONE,
    "fail": Code.REGRESSION,
    "inconclusive": Code.INCONCLUSIVE,
    "error": Code.UNMEASURED,
}
ALWAYS = {
    Code.UNMEASURED: "it failed, or its output could not be written",
    Code.USAGE: "usage: an argument, a file or a model that cannot be used",
    Code.INTERRUPTED: "interrupted",
}
_TUNED = {
    Code.DONE: "done, also where what was tried did not prove better and the original is kept",
    Code.UNMEASURED: "nothing of what should have been tried could be (it raised, was blocked, or the budget was "
    "spent), or something could not be measured or written; the report says why",
}
_SHOWN = {Code.DONE: "shown"}
_COMPARED = {
    Code.DONE: "a candidate passes",
    Code.REGRESSION: "all candidates fail",
    Code.INCONCLUSIVE: "inconclusive",
    Code.UNMEASURED: "no candidate could be measured, or the result could not be written",
}
_OWN: Mapping[str, Mapping[Code, str]] = {
    "demo": _TUNED,
    "tune": _TUNED,
    "profile": {Code.DONE: "measured, or the command printed", Code.UNMEASURED: "could not be measured or written"},
    "check record": {Code.DONE: "recorded", Code.UNMEASURED: "could not be measured or written"},
    "check run": {
        Code.DONE: "pass",
        Code.REGRESSION: "regression",
        Code.INCONCLUSIVE: "inconclusive",
        Code.UNMEASURED: "could not measure, or the result could not be written",
    },
    "experiment run": _COMPARED,
    "experiment status": _SHOWN,
    "experiment report": _COMPARED,
    "serve": {Code.DONE: "asked to end, and ended"},
    "bench-serve": {Code.DONE: "printed", Code.UNMEASURED: "the server does not answer"},
    "plan-capacity": {Code.DONE: "printed", Code.REGRESSION: "no replica is fast enough"},
    "doctor": _SHOWN,
    "plan": _SHOWN,
    "report": {Code.DONE: "shown or written"},
    "policies": _SHOWN,
    "policies check": {Code.DONE: "the policy is valid", Code.USAGE: "usage, or the policy is not valid"},
    "transforms": _SHOWN,
}
COMMANDS: Mapping[str, Mapping[Code, str]] = {
    command: dict(sorted({**ALWAYS, **own}.items())) for command, own in _OWN.items()
}


def text(command: str) -> str:
    """Return the codes of a command in a sentence, for its help; empty for an unknown command."""
    meanings = COMMANDS.get(command, {})
    return f"Exit codes: {'; '.join(f'{code}: {said}' for code, said in meanings.items())}." if meanings else ""


def table() -> str:
    """Return the codes of all commands as a Markdown table; commands with the same codes share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for command, meanings in COMMANDS.items():
        cells = tuple(meanings.get(code, "") for code in Code if code not in (Code.USAGE, Code.INTERRUPTED))
        rows.setdefault(cells, []).append(f"`{command}`")
    head = ("| command | 0 | 1 | 2 | 3 |", "|---|---|---|---|---|")
    return "\n".join((*head, *(f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in rows.items())))
