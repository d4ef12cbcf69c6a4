"""What the built-in policies come to in the simulation, for each GPU, size, dtype and policy, at their own budgets."""

from __future__ import annotations

import pytest
import torch

from autotune.machine.hardware import Hardware
from autotune.runtime.variant import Variant
from autotune.tune.plan import TrialOutcome
from autotune.workload import Phase
from tests.tune.simulated import A100, B200, H100, L4, RTX, World, tuned

INT4 = ("int4_weight_only", "int4_hqq", "triton_weights 4")
BITS = {"": "16 bits", "nf4": "NF4"} | dict.fromkeys(INT4, "INT4")  # others: 8 bits
OVERRUN = 1.1  # of the budget


def ending(world: World, variant: Variant) -> str:
    """A variant in words: decode and prefill, each with its weights and how it is launched."""
    names = world.names(variant)
    phases: tuple[Phase, ...] = ("decode", "prefill")
    decode, prefill = (BITS.get(world.format(variant, phase), "8 bits") for phase in phases)
    graph, step, whole, once = (
        name in names for name in ("cuda_graph", "compile_step", "compile_prefill", "capture_prefill")
    )
    return f"{decode}{', graph' * graph}{', compiled' * step}; {prefill}{', graph' * once}{', compiled' * whole}"


BESIDE = "it takes {} GB beside what serves now, and {} GB of memory are free"
TOO_LARGE = "decode needs 64.3 GB, more than 90 % of the 25.8 GB there are"
ALONE, GRAPH = "16 bits; 16 bits", "16 bits, graph, compiled; 16 bits"
GRAPHS, BOTH = "{}, graph, compiled; {}, graph", "{}, graph, compiled; {}, graph, compiled"
# GPU, billions of parameters -> what the policies `balanced` and `latency` end with, what is refused for lack of memory
ENDINGS: list[tuple[Hardware, int, str, str, str | None]] = [
    (A100, 1, GRAPHS.format("8 bits", "16 bits"), BOTH.format("INT4", "8 bits"), None),
    (H100, 1, GRAPHS.format("8 bits", "16 bits"), BOTH.format("INT4", "8 bits"), None),
    (RTX, 1, GRAPHS.format("8 bits", "16 bits"), GRAPHS.format("INT4", "8 bits"), None),
    # its prefill computes: 8-bit arithmetic, which `strict` does not allow, gains time only together with compiling
    (L4, 1, "8 bits, graph, compiled; 16 bits", "INT4, graph, compiled; 8 bits, compiled", None),
    (B200, 1, GRAPHS.format("8 bits", "16 bits"), BOTH.format("INT4", "16 bits"), None),
    (A100, 8, "8 bits, graph, compiled; 16 bits", "INT4, graph, compiled; 8 bits, compiled", None),
    (H100, 8, GRAPHS.format("8 bits", "16 bits"), GRAPHS.format("INT4", "8 bits"), None),
    (B200, 8, GRAPHS.format("8 bits", "16 bits"), BOTH.format("INT4", "8 bits"), None),
    # 8 bits do not fit beside the original; INT4 does, which `strict` does not allow
    (RTX, 8, GRAPH, "INT4, graph, compiled; 16 bits", BESIDE.format("12.3", "6.73")),
    # it reads its 16-bit weights for longer than the host launches: a graph is of little use, a compiled step of none
    (L4, 8, "16 bits, graph; 16 bits", "INT4, graph, compiled; 16 bits", BESIDE.format("12.3", "6.73")),
    # nor does INT4
    (A100, 32, GRAPH, GRAPH, BESIDE.format("20", "14.9")),
    (H100, 32, GRAPH, GRAPH, BESIDE.format("20", "14.9")),
    (B200, 32, GRAPHS.format("8 bits", "16 bits"), GRAPHS.format("INT4", "8 bits"), None),
    # the model itself does not
    (RTX, 32, ALONE, ALONE, TOO_LARGE),
    (L4, 32, ALONE, ALONE, TOO_LARGE),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("policy", ["balanced", "latency"])
@pytest.mark.parametrize(
    ("machine", "billions", "balanced", "latency", "refused"),
    [pytest.param(*row, id=f"{row[0].name}-{row[1]}e9") for row in ENDINGS],
)
def test_weights_as_narrow_as_fit_and_graphs_within_the_budget(
    machine: Hardware,
    billions: int,
    balanced: str,
    latency: str,
    refused: str | None,
    policy: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(machine, billions)
    found = tuned(policy, world, dtype, monkeypatch)
    before, after = (state.profile.phases["prefill"].seconds for state in (found.before, found.after))
    assert ending(world, found.after.variant) == (balanced if policy == "balanced" else latency)
    assert after <= before
    assert found.budget_s is not None
    assert world.now <= OVERRUN * found.budget_s
    lacking = [trial.reason for trial in found.trials if " GB " in trial.reason]
    assert any(refused in reason for reason in lacking) if refused else not lacking
    if refused == TOO_LARGE:
        assert {trial.outcome for trial in found.trials} <= {TrialOutcome.SKIPPED, TrialOutcome.UNAVAILABLE}


@pytest.mark.parametrize("budget_s", [120.0, 240.0])
@pytest.mark.parametrize("billions", [8, 32])
@pytest.mark.parametrize("machine", [A100, H100, RTX, L4, B200], ids=lambda machine: machine.name)
def test_an_exact_budget_is_kept_for_every_size(
    machine: Hardware, billions: int, budget_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(machine, billions)
    assert tuned("balanced", world, torch.bfloat16, monkeypatch, budget_s).budget_s == budget_s
    assert world.now <= OVERRUN * budget_s


@pytest.mark.parametrize(
    ("machine", "policy", "decode"),
    [
        (A100, "balanced", "8 bits, graph"),
        (A100, "latency", "INT4, graph"),
        (H100, "balanced", "8 bits, graph"),
        (H100, "latency", "INT4, graph"),
        # its bandwidth leaves weights less to gain than attention; both take longer
        (B200, "balanced", "16 bits, graph"),
        (B200, "latency", "INT4, graph"),
    ],
)
def test_what_four_minutes_reach_for_8_billion_parameters(
    machine: Hardware, policy: str, decode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(machine, 8)
    found = tuned(policy, world, torch.bfloat16, monkeypatch, 240.0)
    assert ending(world, found.after.variant).startswith(decode)
