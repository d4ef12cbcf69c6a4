"""What the environment says about the replicas. Imports nothing of Ray.

AUTOTUNE_MODEL          a directory, a GGUF file or a hub name
AUTOTUNE_NAME           the name that clients use; default: the model's own
AUTOTUNE_POLICY         default `throughput`; `none` serves untuned
AUTOTUNE_API_KEY        asked for on every route but /livez and the bare page
AUTOTUNE_DEADLINE       seconds after which an answer is given up; default: never
AUTOTUNE_MAX_PROMPT     most tokens of a prompt; default: as many as the context holds
AUTOTUNE_LOG_LEVEL      debug, info (default), warning or error
AUTOTUNE_CPUS           of a replica; default 2
AUTOTUNE_REPLICAS       the fewest and the most; default 1:4
AUTOTUNE_CANARY         limits of a canary as JSON: the fields of `CanaryRules` ({"slower": 0.1})
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autotune.serve.run import Settings


def cpus(environment: Mapping[str, str]) -> int:
    """Return the number of cores of a replica."""
    return int(environment.get("AUTOTUNE_CPUS", "2"))


def replicas(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the fewest and the most replicas."""
    fewest, most = environment.get("AUTOTUNE_REPLICAS", "1:4").split(":")
    return int(fewest), int(most)


def settings(environment: Mapping[str, str]) -> Settings:
    """Return how a replica serves.

    Raises:
        SettingsError: the key cannot be used, or the log level is none.
        PolicyError: there is no such policy.
    """
    from autotune.errors import SettingsError
    from autotune.serve import keys, logs
    from autotune.serve.rollout.decision import CanaryRules
    from autotune.serve.run import Settings
    from autotune.tune import policy

    chosen = environment.get("AUTOTUNE_POLICY", "throughput")
    deadline, longest = environment.get("AUTOTUNE_DEADLINE"), environment.get("AUTOTUNE_MAX_PROMPT")
    level = environment.get("AUTOTUNE_LOG_LEVEL", "info")
    if level not in logs.LEVELS:
        raise SettingsError(f"AUTOTUNE_LOG_LEVEL is {level!r}; expected one of {', '.join(logs.LEVELS)}")
    return Settings(
        environment.get("AUTOTUNE_MODEL", ""),
        name=environment.get("AUTOTUNE_NAME"),
        policy=None if chosen == "none" else policy.load(chosen),
        keys=keys.given((), None, environment),
        deadline_s=float(deadline) if deadline else None,
        longest=int(longest) if longest else None,
        log_level=level,
        rollout=CanaryRules(**json.loads(environment.get("AUTOTUNE_CANARY", "{}"))),
    )
