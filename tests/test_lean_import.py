"""`import autotune` is lean: what is heavy or optional is imported when it is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = [
    "transformers",
    "torch._dynamo",
    "torch._inductor",
    "torchao",
    "bitsandbytes",
    "flash_attn",
    "triton",
    "rich",
    "matplotlib",
]


@pytest.mark.parametrize(
    "name", ["autotune", "autotune.transforms", "autotune.cli", "autotune.report", "autotune.compare.check"]
)
def test_importing_pulls_in_nothing_heavy(name: str) -> None:
    code = (
        "import json, sys, torch; before = set(sys.modules);"
        f"import {name}; print(json.dumps(list(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    imported = json.loads(done.stdout)
    assert not [module for module in imported if module in HEAVY or module.split(".")[0] in HEAVY]
