"""Which API keys a server takes, and from where."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from autotune.cli import main
from autotune.errors import SettingsError
from autotune.serve import gate, keys
from autotune.serve.gate import Gate
from autotune.serve.run import warn_if_open

ODD = ["", " ", "a b", "schlüssel", "a\n", "\x7f"]


@pytest.mark.parametrize("key", ODD)
def test_a_key_that_no_header_carries_is_refused_wherever_it_comes_from(key: str) -> None:
    unused: object = None
    for give in (
        lambda: keys.given([key], None, {}),
        lambda: keys.given(["good", key], None, {}),
        lambda: keys.given((), None, {keys.VARIABLE: key}),
        lambda: Gate(unused, [key], unused, unused, (), unused, unused),
    ):
        with pytest.raises(SettingsError) as raised:
            give()
        assert not key.strip() or key not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "lines", "variable", "expected"),
    [
        ([], None, None, ()),
        (["a"], None, None, ("a",)),
        (["a", "b"], None, "c", ("a", "b")),
        ([], None, "c", ("c",)),
        ([], "d\n\n e \n", "c", ("d", "e")),
        (["a"], "d\n", None, ("a", "d")),
    ],
)
def test_where_keys_come_from(
    arguments: list[str], lines: str | None, variable: str | None, expected: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    if lines is not None:
        file.write_text(lines)
    environment = {keys.VARIABLE: variable} if variable is not None else {}
    assert keys.given(arguments, file if lines is not None else None, environment) == expected


@pytest.mark.parametrize("lines", [None, "", "\n \n", "ok\nnot ok\n"])
def test_a_file_without_usable_keys_is_refused(lines: str | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(SettingsError, match=re.escape(str(file))):
        keys.given((), file, {})


@pytest.mark.parametrize(("arguments", "variable"), [(["--api-key", ""], None), ([], ""), ([], "a b")])
def test_the_command_ends_as_for_other_bad_arguments(
    arguments: list[str],
    variable: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(keys.VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(keys.VARIABLE, variable)
    assert main(["serve", "no/such/model", *arguments]) == 4
    assert "API key" in capsys.readouterr().err


@pytest.mark.parametrize(("offered", "fits"), [("key-1", True), ("key-2", True), ("key", False), ("schlüssel", False)])
def test_every_key_is_compared_in_a_time_that_tells_nothing(
    offered: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, unused = list[tuple[bytes, bytes]](), cast("Any", None)

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(gate, "hmac", SimpleNamespace(compare_digest=compare_digest))
    found = Gate(unused, ["key-1", "key-2"], unused, unused, (), unused, unused)
    assert found._is_known({"x-api-key": offered}) is fits
    assert compared == [(offered.encode(), b"key-1"), (offered.encode(), b"key-2")]


@pytest.mark.parametrize(
    ("address", "own", "warns"),
    [
        ("127.0.0.1", (), False),
        ("127.1.2.3", (), False),
        ("::1", (), False),
        ("0.0.0.0", (), True),
        ("::", (), True),
        ("192.0.2.7", (), True),
        ("0.0.0.0", ("key",), False),
    ],
)
def test_an_open_server_is_warned_of(
    address: str, own: tuple[str, ...], warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_open(address, own)
    assert ("no API key is asked for" in caplog.text) == warns
