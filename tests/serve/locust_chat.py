"""What locust's users ask of `autotune serve`: one streamed chat after the other. `make test-serve` runs it.

Beside each request it reports the time to the first token ("TTFT") and every gap between two events ("between
tokens"), in milliseconds, so that locust's own percentiles are those of the table.
"""

from __future__ import annotations

import os
import random
import time
from typing import Any

from locust import HttpUser, constant, events, task

WORDS = ("tide", "moon", "yeast", "rust", "chess", "fugue", "heap", "salt", "river", "glass", "north", "paper")
PROMPT_WORDS, NEW_TOKENS = 64, 32
MODEL = os.environ.get("SERVED_MODEL", "")


class Client(HttpUser):
    """A client that asks again as soon as it has its answer."""

    wait_time = constant(0)
    draw = random.Random(0)

    @task
    def ask(self) -> None:
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": " ".join(self.draw.choices(WORDS, k=PROMPT_WORDS))}],
            "max_tokens": NEW_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        began = last = time.perf_counter()
        tokens, ended = 0, False
        request: Any = self.client.post(
            "/v1/chat/completions", json=body, stream=True, catch_response=True, name="chat"
        )
        with request as response:
            for line in response.iter_lines():
                ended |= line == b"data: [DONE]"
                if b'"content"' not in line or b'"role"' in line:
                    continue
                now = time.perf_counter()
                note("TTFT" if not tokens else "between tokens", now - last)
                tokens, last = tokens + 1, now
            if response.status_code != 200:
                response.failure(f"status {response.status_code}: {response.text[:200]}")
            elif not ended or not tokens:
                response.failure(f"the stream broke off after {tokens} events")
            else:
                response.success()
        note("whole answer", time.perf_counter() - began)


def note(name: str, seconds: float) -> None:
    events.request.fire(
        request_type="stream", name=name, response_time=seconds * 1e3, response_length=0, exception=None
    )
