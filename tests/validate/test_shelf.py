"""Tensors in memory and in a file: the same come back, within bounds, and a full disk costs room alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from autotune.validate.shelf import Shelf

pytestmark = pytest.mark.usefixtures("own_cache")


def tensors(count: int = 6) -> dict[str, torch.Tensor]:
    """Of 240 bytes each."""
    torch.manual_seed(0)
    return {str(k): torch.randn(2, 3, 20).half() for k in range(count)}


def filled(memory_bytes: int, file_bytes: int = 10**6) -> Shelf:
    shelf = Shelf(memory_bytes, file_bytes)
    for name, tensor in tensors().items():
        shelf.put(name, tensor)
    return shelf


@pytest.mark.parametrize(("memory", "near"), [(0, 0), (239, 0), (240, 1), (500, 2), (10**6, 6)])
def test_what_was_put_comes_back(memory: int, near: int) -> None:
    shelf = filled(memory)
    assert len(shelf._near) == near
    assert set(shelf) == set(tensors())
    assert shelf.nbytes == 6 * 240
    for _ in range(2):
        assert all(torch.equal(shelf[name], tensor) for name, tensor in tensors().items())
    assert shelf.get("another") is None


def test_what_comes_from_the_file_is_its_readers_own() -> None:
    shelf = filled(0)
    shelf["1"].zero_()
    assert torch.equal(shelf["1"], tensors()["1"])


@pytest.mark.parametrize(("room", "kept"), [(0, 0), (239, 0), (240, 1), (3 * 240 + 1, 3)])
def test_the_file_is_bounded(room: int, kept: int) -> None:
    shelf = Shelf(0, room)
    assert [shelf.put(name, tensor) for name, tensor in tensors().items()] == [k < kept for k in range(6)]
    assert len(shelf) == kept


@pytest.mark.parametrize("memory", [0, 10**6])
def test_what_is_dropped_is_gone_and_the_others_stay(memory: int) -> None:
    shelf = filled(memory)
    shelf.drop("2")
    shelf.drop("another")
    assert "2" not in shelf
    assert shelf.put("2", torch.ones(5).half())
    assert all(torch.equal(shelf[name], tensor) for name, tensor in tensors().items() if name != "2")
    assert torch.equal(shelf["2"], torch.ones(5).half())


def test_nobody_sees_the_file(own_cache: Path) -> None:
    shelf = filled(0)
    assert len(shelf) == 6
    assert list((own_cache / "references").iterdir()) == []


@pytest.mark.fault("A29")
def test_a_full_disk_keeps_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    shelf = Shelf(0, 10**6)
    first, second, third = list(tensors(3).values())
    assert shelf.put("first", first)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        assert not shelf.put("second", second)
    assert not shelf.put("third", third), "it is not tried again"
    assert list(shelf) == ["first"]
    assert torch.equal(shelf["first"], first)


def test_partial_writes_and_reads_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, rest, at: write(file, rest[:50], at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:70]], at))
    shelf = filled(0)
    assert all(torch.equal(shelf[name], tensor) for name, tensor in tensors().items())


def test_of_a_shelf_is_the_shelf() -> None:
    shelf = filled(0)
    assert Shelf.of(shelf) is shelf
    assert {name: tensor.tolist() for name, tensor in Shelf.of(tensors()).items()} == {
        name: tensor.tolist() for name, tensor in tensors().items()
    }


@pytest.mark.parametrize("strided", [torch.zeros(4, 6).half().T, torch.zeros(0, 3).half(), torch.tensor(1.5).half()])
def test_any_layout(strided: torch.Tensor) -> None:
    shelf = Shelf(0)
    assert shelf.put("it", strided)
    assert torch.equal(shelf["it"], strided)
