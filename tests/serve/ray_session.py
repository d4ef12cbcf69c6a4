"""What tests/serve/test_ray.py runs in a process of its own: `python -m tests.serve.ray_session PORT`.

Two replicas over a tiny model on one machine: a plan is rolled out, requests that begin alike meet, the canary of
another plan is killed under load, with streams under way. Prints what was found as a line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
import torch
from ray import serve

from autotune.transforms.continuous_batching import ContinuousBatching
from autotune.transforms.lean_loop import LeanLoop
from autotune.transforms.step_program import StepProgram
from autotune.tune import plan as plans
from examples.ray_serve.app import app
from tests.live.test_adopt import made_for
from tests.models import tiny, tiny_tokenizer, token_prompts

TOGETHER = (StepProgram("decode", slots=256), ContinuousBatching("decode", rows=4))
TOKENS = 12
LONG = 120  # of a stream
REPLICA = "ray::ServeReplica:autotune:Model"
WITHIN_S = 300.0  # for what takes seconds on an idle machine


@dataclass
class Load:
    """Clients that ask one request after the other and compare every answer. They never retry.

    Attributes:
        wrong: answers that are not the model's, and errors; streams that are cut off without an error, too.
        answered: when each answer came, monotonic seconds.
        broken: streams that broke off with an error: how many of their parts came.
        errors: these errors.
        streamed: number of streams that were whole.
        by: number of answers by replica.
    """

    url: str
    wrong: list[str] = field(default_factory=list)
    answered: list[float] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    errors: set[str] = field(default_factory=set)
    streamed: int = 0
    by: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        model, tokenizer = tiny("llama"), tiny_tokenizer()

        def right(prompt: list[int], tokens: int) -> tuple[list[int], str]:
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
            return prompt, str(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))

        self._right = [right(prompt, TOKENS) for prompt in token_prompts(6)]
        model.generation_config.eos_token_id = None  # streams ignore it
        self._long = [right(prompt, LONG) for prompt in token_prompts(6)]

    def _ask(self, over: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not over.is_set():
                for prompt, right in self._right:
                    try:
                        answer = completion(client, prompt)
                        text = answer.json()["choices"][0]["text"]
                    except Exception as error:
                        self.wrong.append(repr(error)[:300])
                        continue
                    self.answered.append(time.monotonic())
                    self.by[answer.headers["x-replica"]] += 1
                    if text != right:
                        self.wrong.append(text)

    def _stream(self, over: threading.Event) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not over.is_set():
                for prompt, right in self._long:
                    texts, error = list[str](), ""
                    try:
                        for event in events(client, prompt, LONG):
                            texts += [choice["text"] for choice in event.get("choices", ())]
                            error = event.get("error", {}).get("code", error)
                    except Exception as failure:
                        error = repr(failure)
                    text = "".join(texts)
                    if error and texts and right.startswith(text):
                        self.broken.append(len(texts))
                        self.errors.add(error)
                    elif error or text != right:
                        self.wrong.append(f"a stream of {len(texts)} parts: {error or text[-50:]}"[:300])
                    else:
                        self.streamed += 1

    @contextmanager
    def on(self, clients: int = 3, streams: int = 0) -> Iterator[None]:
        """Ask as long as the context is held."""
        over = threading.Event()
        threads = [threading.Thread(target=self._ask, args=(over,)) for _ in range(clients)]
        threads += [threading.Thread(target=self._stream, args=(over,)) for _ in range(streams)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()


def completion(client: httpx.Client, prompt: list[int], tokens: int = TOKENS) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    return client.post("/v1/completions", json=body).raise_for_status()


def events(client: httpx.Client, prompt: list[int], tokens: int) -> Iterator[dict[str, Any]]:
    """The events of a stream as they come, but the last. Raises EOFError if it ends without that."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                return
            if line:
                yield json.loads(line.removeprefix("data: "))
    raise EOFError("the stream ended in silence")


def replicas() -> set[int]:
    """Process ids of the replicas."""
    named = ((each.pid, " ".join(each.info["cmdline"] or [])) for each in psutil.process_iter(["cmdline"]))
    return {pid for pid, command in named if command.startswith(REPLICA)}


def holder(lock: Path) -> int:
    """Process id of who holds a lock."""
    inode = str(lock.stat().st_ino)
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return next((int(line[4]) for line in lines if line[5].rpartition(":")[2] == inode), 0)


def until(true: Callable[[], Any]) -> Any:
    """Wait until something is so, and return it; what it was last, if it never is."""
    end = time.monotonic() + WITHIN_S
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def served_by_a_canary(client: httpx.Client, plan: Any) -> str | None:
    """Offer a plan, also again where noise hid that it holds. Returns its hash once a canary serves with it."""
    kind = {"Content-Type": "application/json"}
    answer = client.post("/autotune/rollout", content=plans.dumps(plan).encode(), headers=kind).raise_for_status()
    plan_hash: str = answer.json()["offered"]

    def verified() -> Any:
        found = client.get("/autotune/rollout").json()["rollout"]
        is_over = found and found["plan"] == plan_hash and (found["serves"] or found["state"] != "canary")
        return found if is_over else None

    return plan_hash if until(verified)["serves"] else None


def rollout(client: httpx.Client, *, state: str) -> dict[str, Any] | None:
    """The latest rollout, if it is in this state."""
    found = client.get("/autotune/rollout").json()["rollout"]
    return found if found and found["state"] == state else None


def serving(client: httpx.Client) -> dict[str, str | None]:
    """Replica -> hash of the plan that it serves with, of those that answer ten requests."""
    answers = [client.get("/autotune/rollout") for _ in range(10)]
    return {answer.headers["x-replica"]: answer.json()["serves"] for answer in answers}


def two(found: dict[str, Any]) -> dict[str, Any] | None:
    """What was found, if both replicas answered."""
    return found if len(found) == 2 else None


def hits(client: httpx.Client) -> dict[str, float]:
    """Replica -> tokens of prompts that it reused, of those that answer ten requests."""
    found = {}
    for _ in range(10):
        answer = client.get("/metrics")
        lines = [line for line in answer.text.splitlines() if line.startswith("autotune:prefix_cache_hits_total")]
        found[answer.headers["x-replica"]] = float(lines[0].split()[-1])
    return found


def met(client: httpx.Client, url: str) -> dict[str, Any]:
    """Ask with one beginning, one after the other and then all at once."""
    beginning = [3 + n % 200 for n in range(140)]
    before = hits(client)
    one = [completion(client, [*beginning, 10 + n]).headers["x-replica"] for n in range(8)]
    time.sleep(1)
    after = hits(client)

    def ask(n: int) -> str:
        with httpx.Client(base_url=url, timeout=60) as own:
            return completion(own, [*beginning, 10 + n % 100], 60).headers["x-replica"]

    with ThreadPoolExecutor(48) as pool:
        flood = Counter(pool.map(ask, range(96)))
    gained = {name: after[name] - before.get(name, 0) for name in after}
    total = sum(gained.values())
    return {"alone": len(set(one)), "gained": gained.get(one[0], 0), "total": total, "flood": dict(flood)}


def main(port: int) -> None:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(app, name="autotune")
    url, model = f"http://127.0.0.1:{port}", tiny("llama")
    lock = next(Path(os.environ["AUTOTUNE_CACHE_DIR"]).glob("rollouts/*/lock"))
    load, found = Load(url), dict[str, Any]()
    with httpx.Client(base_url=url, timeout=60) as client:
        with load.on():  # what the plan is verified for
            until(lambda: len(load.by) == 2 and len(load.answered) > 50)
        first = until(lambda: served_by_a_canary(client, made_for(model, *TOGETHER)))
        with load.on():
            ended = until(lambda: rollout(client, state="promoted") or rollout(client, state="rolled back"))
        found["first"] = ended
        found["followed"] = bool(until(lambda: list(serving(client).values()) == [first, first]))
        found["answered"] = dict(load.by)
        found["met"] = met(client, url)
        before = replicas()
        until(lambda: served_by_a_canary(client, made_for(model, LeanLoop())))
        with load.on(streams=6):
            until(lambda: load.streamed > 20)
            victim = holder(lock)
            assert victim, "no replica is the canary"  # 0 would be this process's own group
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            found["second"] = until(lambda: rollout(client, state="rolled back"))
            until(lambda: len(replicas()) == 2 and victim not in replicas())
            until(lambda: sum(at > killed for at in load.answered) > 200)
        found["serving"] = list(until(lambda: two(serving(client))).values())
        found["promoted"] = first
        found |= {"before": len(before), "was_replica": victim in before, "new": len(replicas() - before)}
        found |= {"broken": load.broken, "errors": sorted(load.errors), "streamed": load.streamed}
        found |= {"wrong": load.wrong[:5], "since": sum(at > killed for at in load.answered)}
    sys.stdout.write(f"{json.dumps(found)}\n")
    serve.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]))
