"""A warning that our own modules cause is an error, another library's is not: `filterwarnings` in pyproject.toml."""

from __future__ import annotations

import functools
import importlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

OURS = [
    "autotune",
    "autotune.runtime.loop",
    "autotune_pytest",
    "tests.live.test_wrap",
    "benchmarks.smoke",
    "examples.serving",
    "readme",
]
OTHERS = [
    "transformers.generation.utils",
    "torchao.utils",
    "testsuite",
    "autotuner",
    "torch.nn.modules.linear",
    # on a GPU: set_sync_debug_mode, and compiling where TF32 is off
    *("torch.cuda", "torch._inductor.compile_fx"),
]


def attributed(to: str, category: type[Warning] = FutureWarning, said: str = "this is old") -> list[str]:
    """What is collected of a warning attributed to module `to`; raises it where it is an error."""
    with warnings.catch_warnings(record=True) as collected:
        warnings.warn_explicit(said, category, "a file", 1, module=to)
    return [str(warning.message) for warning in collected]


@pytest.mark.parametrize("category", [UserWarning, DeprecationWarning, FutureWarning, RuntimeWarning, SyntaxWarning])
def test_whose_warning_is_an_error(category: type[Warning]) -> None:
    for module in OURS:
        with pytest.raises(category, match="old"):
            attributed(module, category)
    for module in OTHERS:
        assert attributed(module, category) == ["this is old"]


def test_a_deprecation_is_an_error_for_who_calls_the_old_way() -> None:
    library: dict[str, Any] = {"__name__": "library", "warnings": warnings}
    exec("def old(level): warnings.warn('use the new way', FutureWarning, level)\ndef inner(): old(2)", library)
    with pytest.raises(FutureWarning, match="new way"):
        library["old"](2)
    with warnings.catch_warnings(record=True) as collected:
        library["inner"]()
        library["old"](1)
    assert len(collected) == 2


def test_a_model_called_the_old_way_is_an_error() -> None:
    """Its forward warns whoever called it, which is torch's `Module.__call__`."""

    def deprecated(forward: Any) -> Any:
        @functools.wraps(forward)
        def warned(self: Any, x: Any) -> Any:
            warnings.warn("use the new way", FutureWarning, stacklevel=2)
            return forward(self, x)

        return warned

    class Model(torch.nn.Module):
        @deprecated
        def forward(self, x: Any) -> Any:
            return x

    with pytest.raises(FutureWarning, match="new way"):
        Model()(1)


def test_what_autotune_says_is_an_error_wherever_it_is_attributed() -> None:
    with pytest.raises(RuntimeWarning, match="failed"):
        attributed("torch.utils._contextlib", RuntimeWarning, "autotune: the plan failed")


def test_a_library_that_is_compiled_at_import_may_warn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its bytecode was there already must not decide whether a test passes."""
    (tmp_path / "careless_library.py").write_text("answer = 1 is 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    with warnings.catch_warnings(record=True) as collected:
        assert importlib.import_module("careless_library").answer
    assert [warning.category for warning in collected] == [SyntaxWarning]
