"""Every tensor that the package makes has a dtype and a device of its own: both defaults belong to the whole process.

Another thread inside `from_pretrained` changes the default dtype for a while, and memory that is handed to C++ must not
come out smaller for it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import autotune

FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "full", "linspace", "logspace", "normal"),
    *("ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor", "tensor", "zeros"),
    *("bartlett_window", "blackman_window", "hamming_window", "hann_window", "kaiser_window"),
    *("tril_indices", "triu_indices", "sparse_coo_tensor"),
}
LEGACY = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "IntTensor", "LongTensor"}
PACKAGE = Path(autotune.__file__).parent


def defects(source: str) -> Iterator[tuple[int, str]]:
    """Lines at which a tensor is made whose dtype or device is left to the process's defaults, and what is missing."""
    tree = ast.parse(source)
    modules, functions = {"torch"}, dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {name.asname for name in node.names if name.name == "torch" and name.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            functions |= {name.asname or name.name: name.name for name in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called: str | None = None
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = node.func.attr if node.func.value.id in modules else None
        elif isinstance(node.func, ast.Name):
            called = functions.get(node.func.id)
        if called in LEGACY:
            yield node.lineno, f"{called} has no dtype and device"
        elif called in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            if missing := [name for name in ("dtype", "device") if name not in given]:
                yield node.lineno, f"{called} without {' and '.join(missing)}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_is_made_with_a_dtype_and_a_device(path: Path) -> None:
    assert list(defects(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("import torch\nx = torch.zeros(3)", [(2, "zeros without dtype and device")]),
        ("import torch\nx = torch.zeros(3, dtype=torch.int64)", [(2, "zeros without device")]),
        ("import torch\nx = torch.arange(3, device=where)", [(2, "arange without dtype")]),
        ("import torch as t\nx = t.tensor([[1]])", [(2, "tensor without dtype and device")]),
        ("from torch import empty\nx = empty(3)", [(2, "empty without dtype and device")]),
        ("from torch import ones as units\nx = units(3)", [(2, "ones without dtype and device")]),
        ("import torch\ndef f():\n    return g(torch.full((2,), 1.0))", [(3, "full without dtype and device")]),
        ("import torch\nx = torch.FloatTensor(3)", [(2, "FloatTensor has no dtype and device")]),
        ("import torch\nx = torch.zeros(3, **kwargs)", [(2, "zeros without dtype and device")]),
        ("import torch\nx = torch.zeros(3, dtype=torch.int64, device='cpu')", []),
        ("import torch\nx = torch.zeros_like(y) + y.new_zeros(3)", []),
        ("import numpy\nx = numpy.zeros(3)", []),
        ("import torch\nx = torch.add(y, y)", []),
    ],
)
def test_what_is_missing_is_found(source: str, missing: list[tuple[int, str]]) -> None:
    assert list(defects(source)) == missing
