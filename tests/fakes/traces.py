"""A GPU's side of a trace, added to what the host really did: as if every operator that works had launched a kernel.

Kernels run one after the other, each as long as on the fake's clock, and none before its launch arrives. What is inside
a replay is one launch of a graph. An operator that waits shows a call that waits until everything before it has run.
"""

from __future__ import annotations

import json
from itertools import count
from typing import Any

REPLAY = "fake replay"
KERNEL_US, ARRIVAL_US, CALL_US = 5.0, 4.0, 0.5
_IDLE = (
    "empty empty_strided empty_like view reshape _reshape_alias transpose t permute expand expand_as slice select "
    "unsqueeze squeeze as_strided alias detach item is_nonzero narrow split chunk unbind resolve_conj resolve_neg to "
    "contiguous _unsafe_view lift_fresh view_as unflatten flatten result_type resize_ unfold diagonal set_"
)
IDLE = frozenset(_IDLE.split())
WAITS = frozenset({"_local_scalar_dense", "nonzero", "equal"})


def with_device(trace: bytes) -> bytes:
    """The trace of a CPU with the events of a device that would have run its operators."""
    document = json.loads(trace)
    events = [e for e in document["traceEvents"] if e.get("cat") in ("cpu_op", "user_annotation")]
    events.sort(key=lambda e: (e["ts"], -e["dur"]))
    added, numbers, free_at = list[dict[str, Any]](), count(1), 0.0
    for event, leaf, replay in _with_place(events):
        name = event["name"].rpartition("::")[2]
        if event is replay:
            event["fake correlation"] = next(numbers)
            added.append(_call("cudaGraphLaunch", event, event["fake correlation"]))
        elif event["cat"] == "cpu_op" and name in WAITS:
            added.append(_call("cudaStreamSynchronize", event, next(numbers), max(CALL_US, free_at - event["ts"])))
        elif event["cat"] == "cpu_op" and leaf and name not in IDLE:
            launch = replay or event
            number = replay["fake correlation"] if replay else next(numbers)
            if replay is None:
                added.append(_call("cudaLaunchKernel", event, number))
            free_at = max(free_at, launch["ts"] + ARRIVAL_US)
            added.append(_kernel(name, free_at, number))
            free_at += KERNEL_US
    document["traceEvents"] += added
    return json.dumps(document).encode()


def _with_place(events: list[dict[str, Any]]) -> Any:
    """Each event with whether nothing that works is inside it, and the replay that it is in or is."""
    stacks: dict[Any, list[dict[str, Any]]] = {}
    inside, replays = set[int](), dict[int, Any]()
    for event in events:
        stack = stacks.setdefault((event["pid"], event["tid"]), [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= event["ts"]:
            stack.pop()
        if stack and event["cat"] == "cpu_op" and event["name"].rpartition("::")[2] not in IDLE:
            inside.add(id(stack[-1]))
        replays[id(event)] = (
            event if event["name"] == REPLAY else next((e for e in reversed(stack) if e["name"] == REPLAY), None)
        )
        stack.append(event)
    return [(event, id(event) not in inside, replays[id(event)]) for event in events]


def _call(name: str, event: dict[str, Any], number: int, duration: float = CALL_US) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "cuda_runtime",
        "name": name,
        "pid": event["pid"],
        "tid": event["tid"],
        "ts": event["ts"],
        "dur": min(duration, event["dur"]),
        "args": {"correlation": number},
    }


def _kernel(name: str, start: float, number: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": "kernel",
        "name": f"void fake::{name}_kernel<float>(float*)",
        "pid": 0,
        "tid": 7,
        "ts": start,
        "dur": KERNEL_US,
        "args": {"correlation": number, "device": 0, "stream": 7, "est. achieved occupancy %": 50},
    }
