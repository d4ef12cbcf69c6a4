"""The GPU's benchmarks without a GPU: shapes, figures on paper, and a soak on the fake."""

from __future__ import annotations

import pytest
import torch

from autotune.machine import device
from autotune.runtime.steps.graphs import GraphSteps
from benchmarks import gpu, gpu_shapes, gpu_steps, graph_soak
from tests.fakes.cuda import FakeCuda


@pytest.mark.parametrize(("shape", "parameters"), [("1b", 1_498_482_688), ("8b", 8_030_261_248)])
def test_the_gpu_benchmark_is_of_the_class_it_says(shape: str, parameters: int) -> None:
    model = gpu_shapes.random_model(shape, "meta")
    assert (model.num_parameters(), model.dtype) == (parameters, torch.bfloat16)
    prompts = gpu_shapes.random_prompts(model.config.vocab_size, 12, 40)
    assert {len(prompt) for prompt in prompts} == {12}
    assert len(set(map(tuple, prompts))) == len(prompts) == 40


def test_the_paper_says_what_a_token_must_move(capsys: pytest.CaptureFixture[str]) -> None:
    """8e9 weights in BF16 but for the embedding, of which a token reads one row, and 32 layers of keys and values."""
    assert gpu_steps.main(["--paper", "--batches", "1,2", "--prompt-tokens", "1000", "--new-tokens", "2"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| BF16")]
    cache = 1002 * 32 * 2 * 8 * 128 * 2  # the tokens read and the one written
    weights = 2 * (8_030_261_248 - 128256 * 4096)
    found = [float(row[2].removesuffix(" GB")) * 1e9 for row in rows]
    assert found == [pytest.approx(weights + n * cache, rel=2e-3) for n in (1, 2)]
    h100 = list(gpu_steps.DATASHEET).index("H100")
    assert float(rows[0][3 + h100].removesuffix(" ms")) == pytest.approx(found[0] / 0.69 / 3.35e12 * 1e3, abs=0.02)


@pytest.fixture
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
    monkeypatch.setitem(gpu_shapes.SHAPES, "1b", gpu_shapes.COMMON | small | heads)


@pytest.mark.usefixtures("tiny_shapes")
def test_a_step_that_does_not_run_is_a_row_and_the_next_one_runs() -> None:
    said = list[str]()
    asked = ["--device", "cpu", "--shape", "1b", "--prompt-tokens", "8", "--new-tokens", "4", "--rounds", "2"]
    assert gpu_steps.main([*asked, "--plans", "1,0"], said.append) == 1
    rows = [line for line in said if line.startswith("| ")][2:]
    assert "does not run: cpu devices have no graphs" in rows[0]
    assert rows[1].startswith("| lean loop | 0.00 GB | ")
    assert gpu_steps.main([*asked, "--plans", "0", "--seconds", "0"], said.append) == 0
    assert "not tried" in said[-1]


@pytest.mark.usefixtures("tiny_shapes")
@pytest.mark.parametrize("damage", [False, True])
def test_a_soak_of_graphs_sees_a_graph_that_changes(damage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if damage:
        replay = GraphSteps._replayed
        late = 100  # replays after which a graph gives other logits: more than a new variant needs for its answers
        monkeypatch.setattr(GraphSteps, "_replayed", lambda self, *a: replay(self, *a).roll(self.replays // late, -1))
    with device.stand_in(FakeCuda()):
        made, checked, _, wrong = graph_soak.soak("cpu", 4.0, 1, 0)
    assert made >= 1
    assert checked >= 4
    assert bool(wrong) is damage


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_gpu_benchmark_says_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 1
    assert "no CUDA device" in capsys.readouterr().err
