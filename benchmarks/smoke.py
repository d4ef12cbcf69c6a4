"""What a token costs in counts rather than seconds: regressions that show on any machine, however busy.

    make bench-smoke

Serves a small random Llama of four layers with plans that exercise the decode paths, counts what one more token takes,
and compares with the ceilings below. Counting is exact and repeatable; a change that lowers a count should lower its
ceiling. Prints a table. Exit codes: 0 every count is within its ceiling, 1 one is over.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.autograd.profiler import profile
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from autotune import transforms
from autotune.machine.device.trace import silent_kineto
from autotune.runtime.dispatch import serving
from autotune.runtime.steps.program import StepPrograms
from autotune.runtime.variant import Variant

LAYERS, HIDDEN, FFN, VOCABULARY = 4, 256, 512, 1024
PROMPT, FEW, MANY = 16, 8, 24  # tokens: of the prompt, and of the two answers whose difference is counted
Plan = tuple[tuple[str, dict[str, Any]], ...]

NARROW: tuple[str, dict[str, Any]] = ("weight_only", {"bits": 8})
PLANS: dict[str, Plan] = {
    "recorded step": (NARROW, ("step_program", {})),
    "recorded step, 4 bits": (("weight_only", {"bits": 4}), ("step_program", {})),
    "compiled step": (NARROW, ("compile_step", {})),
    "lean loop over slots": (NARROW, ("static_cache", {})),
}
# plan -> count -> at most
COMPILED: dict[str, float] = {"graph breaks, in all": 0, "recompiles, in all": 0}
CEILINGS: dict[str, dict[str, float]] = {
    "recorded step": COMPILED
    | {"operators dispatched": 22, "allocations": 0, "instructions": 170, "barriers": 41, "weights read, KB": 2584},
    "recorded step, 4 bits": COMPILED
    | {"operators dispatched": 22, "allocations": 0, "instructions": 187, "barriers": 45, "weights read, KB": 1520},
    "compiled step": COMPILED | {"operators dispatched": 128, "allocations": 50},
    "lean loop over slots": COMPILED | {"operators dispatched": 810, "allocations": 256},
}


@dataclass(frozen=True)
class Count:
    """One count of one plan, per token unless it says otherwise."""

    plan: str
    name: str
    value: float
    ceiling: float

    @property
    def over(self) -> bool:
        return self.value > self.ceiling


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def per_token(generate: Callable[[int], None]) -> dict[str, float]:
    """Operators dispatched and blocks of memory allocated for each further token."""
    seen = []
    for tokens in (FEW, MANY):
        generate(tokens)
        with silent_kineto(), profile(use_kineto=False, profile_memory=True) as recorded:
            generate(tokens)
        events = recorded.function_events
        seen.append((len(events), sum(e.cpu_memory_usage > 0 for e in events if e.name != "[memory]")))
    (operators, blocks), (more_operators, more_blocks) = seen
    steps = MANY - FEW
    return {
        "operators dispatched": (more_operators - operators) / steps,
        "allocations": (more_blocks - blocks) / steps,
    }


def counts(plan: str) -> dict[str, float]:
    original = model()
    chain = [transforms.make(name, params, "decode") for name, params in PLANS[plan]]
    variant = Variant(original).with_transforms(chain)
    served: Any = serving(variant)
    ids = torch.arange(PROMPT)[None]

    def generate(tokens: int) -> None:
        served.generate(ids, max_new_tokens=tokens, do_sample=False)

    generate(FEW)
    counters.clear()
    found = per_token(generate)
    found["graph breaks, in all"] = sum(counters["graph_break"].values())
    found["recompiles, in all"] = counters["stats"]["unique_graphs"]
    if isinstance(variant.step, StepPrograms) and (program := variant.step.program(1)) is not None:
        found["instructions"] = len(program.instructions)
        found["barriers"] = program.meetings
        found["weights read, KB"] = program.weight_bytes / 1024
    return found


def main() -> int:
    rows = [
        Count(plan, name, value, CEILINGS.get(plan, {}).get(name, 0.0))
        for plan in PLANS
        for name, value in counts(plan).items()
    ]
    width = max(len(row.plan) for row in rows)
    for row in rows:
        verdict = "OVER" if row.over else "ok"
        print(f"{row.plan:{width}}  {row.name:26}  {row.value:8.6g}  at most {row.ceiling:8.6g}  {verdict}")
    return int(any(row.over for row in rows))


if __name__ == "__main__":
    sys.exit(main())
