"""One runtime in a process of its own: requests come in as JSON lines, answers go out as JSON lines.

    python -m benchmarks.worker NAME < requests > answers

It sleeps in a read until it is asked, so that only one of many workers computes at a time. What libraries print goes to
standard error, whichever way they print.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from benchmarks.peers import PEERS, Peer, Runtime, ServingRuntime, Setup


class Answering(Protocol):
    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"value": ...} or {"error": sentence}."""
        ...


class Worker:
    """Answers requests about one runtime. A request names a method of this class and its arguments."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.runtime: Runtime | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{"value": ...}, or {"error": sentence} for whatever the runtime raises."""
        arguments = dict(request)
        try:
            return {"value": getattr(self, "do_" + arguments.pop("do"))(**arguments)}
        except Exception as error:  # a foreign library may raise anything, and the comparison goes on without it
            return {"error": f"{type(error).__name__}: {first_line(error)}"}

    def do_find(self) -> None:
        """An error where its library cannot be imported."""
        self._module()

    def do_prepare(self, setup: Mapping[str, Any]) -> None:
        module = self._module()
        if hasattr(module, "prepare"):
            module.prepare(Setup(**setup), **self.peer.options)

    def do_load(self, setup: Mapping[str, Any]) -> None:
        self.runtime = self._module().create(Setup(**setup), **self.peer.options)

    def do_generate(self, prompts: list[list[int]], new_tokens: int) -> dict[str, float | None]:
        return asdict(self._loaded().generate(prompts, new_tokens))

    def do_serve(self, asked: list[list[list[int]]], new_tokens: int) -> list[float]:
        return cast("ServingRuntime", self._loaded()).serve(asked, new_tokens)

    def do_logits(self, ids: list[int], folder: str) -> dict[str, str]:
        """Writes one .npy file for each path that computed logits."""
        import numpy as np

        files = {}
        for path, rows in self._loaded().logits(ids).items():
            files[path] = f"{folder}/{self.peer.name}-{path}.npy"
            np.save(files[path], rows)
        return files

    def do_describe(self) -> dict[str, Any]:
        runtime = self._loaded()
        return {**memory(), "weights": asdict(runtime.weights()), "notes": runtime.notes()}

    def do_memory(self) -> dict[str, int]:
        return memory()

    def _module(self) -> Any:
        return importlib.import_module(f"benchmarks.peers.{self.peer.module}")

    def _loaded(self) -> Runtime:
        if self.runtime is None:
            raise RuntimeError("nothing was loaded yet")
        return self.runtime


def memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    told = dict(line.split(":", 1) for line in lines)
    names = {"rss_bytes": "VmRSS", "peak_bytes": "VmHWM"}
    return {name: 1024 * int(told[key].split()[0]) for name, key in names.items() if key in told}


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def serve(worker: Answering, lines: Iterable[str], reply: Callable[[str], None]) -> None:
    """Answer until the lines end."""
    for line in lines:
        reply(json.dumps(worker.answer(json.loads(line))))


def main() -> None:
    peer = next(peer for peer in PEERS if peer.name == sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    serve(Worker(peer), sys.stdin, lambda line: print(line, file=answers, flush=True))


if __name__ == "__main__":
    main()
