"""The parent's end of a worker: start it, ask it, notice when it dies."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LAST_WORDS = 400  # bytes of its log that may explain a death


class WorkerError(Exception):
    """The runtime refused, or its process is gone."""


class Remote:
    """A worker process and what it says.

    Args:
        command: what runs it.
        log: file that its standard error goes to.
        environment: on top of this process's.

    Raises:
        WorkerError: the command is not there.
    """

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        self.log = log
        try:
            with log.open("ab") as stream:
                self.process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**os.environ, **environment},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stream,
                    text=True,
                    start_new_session=True,  # with it end the compilers it starts
                )
        except OSError as error:
            raise WorkerError(f"{command[0]} cannot be started: {error.strerror}") from error
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the end

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Any:
        """Its answer.

        Raises:
            WorkerError: it answered with an error, died or took too long; in the last two cases it is gone.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            self.stop()
            raise WorkerError(f"no answer to {request['do']!r} within {timeout_s:.0f} s") from None
        except OSError:  # its end of the pipe is closed
            line = ""
        if not line:
            raise WorkerError(self._epitaph())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["value"]

    def stop(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _epitaph(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            code = 0
        self.stop()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        words = self.log.read_bytes()[-LAST_WORDS:].decode(errors="replace").strip().splitlines()
        return f"its process {how}" + (f": {words[-1]}" if words and code > 0 else "")
