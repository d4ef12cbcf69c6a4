"""A model that bears no 4 bits: the weights of one that was published in 4 bits, each moved off its grid.

Every number of a matrix moves by up to half of the step that 4 bits would have in its group of 32, as far as rounding
to 4 bits moves weights that were trained in full. So 4 bits lose here as much as on such a model. Runtimes are compared
by how near they come to the moved weights, in FP32.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Form
from gguf import GGUFReader, GGUFValueType, GGUFWriter, quants

GROUP, STEPS = 32, 15  # numbers that share a scale, and steps between the least and the largest of them
HEADER = ("GGUF.", "general.architecture", "general.file_type")  # fields that the writer sets itself


def file(source: Path, folder: Path, seed: int = 0) -> Path:
    """The moved weights as a GGUF file in FP32, which is written unless it is there.

    Args:
        source: a GGUF file.
        folder: where to keep it.
    """
    target = folder / f"{source.name.partition('.')[0]}-perturbed-{seed}.F32.gguf"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    draft, reader = target.with_suffix(f".{os.getpid()}.draft"), GGUFReader(source)
    writer = GGUFWriter(draft, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith(HEADER):
            inner = field.types[1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    draw = np.random.default_rng(seed)
    for tensor in reader.tensors:
        numbers = quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, moved(numbers, draw), raw_dtype=Form.F32)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        draft.rename(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def moved(numbers: Any, draw: np.random.Generator) -> Any:
    """A matrix [N, K], each number moved by up to half a step of its group; a vector as it is."""
    if numbers.ndim == 1:
        return numbers.astype(np.float32)
    groups = numbers.reshape(len(numbers), -1, GROUP).astype(np.float32)
    steps = (groups.max(-1, keepdims=True) - groups.min(-1, keepdims=True)) / STEPS
    return (groups + steps * draw.uniform(-0.5, 0.5, groups.shape).astype(np.float32)).reshape(numbers.shape)
