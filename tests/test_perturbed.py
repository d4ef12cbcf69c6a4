"""Weights that bear no 4 bits: what moves, how far, and what of the file stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
perturbed = pytest.importorskip("benchmarks.perturbed")

DRAW = np.random.default_rng(1)
MATRIX, VECTOR = DRAW.normal(size=(6, 64)).astype(np.float32), DRAW.normal(size=64).astype(np.float32)


def test_a_number_moves_by_half_a_step_of_its_group_at_most() -> None:
    after = perturbed.moved(MATRIX, np.random.default_rng(0))
    groups = MATRIX.reshape(6, 2, 32)
    step = (groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / 15
    shift = np.abs(after.reshape(groups.shape) - groups) / step
    assert after.dtype == np.float32
    assert shift.max() < 0.5001
    assert 0.2 < shift.mean() < 0.3
    assert np.array_equal(perturbed.moved(VECTOR, np.random.default_rng(0)), VECTOR)


def test_the_file_is_the_same_but_for_its_matrices(tmp_path: Path) -> None:
    source = tmp_path / "Tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b", "ab"])
    writer.add_token_merges(["a b"])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("output_norm.weight", VECTOR)
    form = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quants.quantize(MATRIX, form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = perturbed.file(source, tmp_path / "kept")
    assert made.name == "Tiny-perturbed-0.F32.gguf"
    before, after = (gguf.GGUFReader(path) for path in (source, made))
    told = {name for name in before.fields if not name.startswith("GGUF.")}
    assert told <= set(after.fields)
    assert all(after.fields[name].contents() == before.fields[name].contents() for name in told)
    norm, matrix = (
        {t.name: t.data for t in after.tensors}[name] for name in ("output_norm.weight", "blk.0.ffn_up.weight")
    )
    assert np.array_equal(norm, VECTOR)
    assert matrix.dtype == np.float32
    assert 0 < np.abs(matrix - MATRIX).max() < 0.5
    assert perturbed.file(source, tmp_path / "kept") == made
    assert [path.name for path in made.parent.iterdir()] == [made.name], "no draft is left"
