"""Checkpoints that hold all of their model's weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NAMED = 3  # missing weights that an error lists


def with_all_weights(where: str | Path, source: Path, **options: Any) -> PreTrainedModel:
    """Load with `from_pretrained`, but refuse a checkpoint that lacks weights. It would fill them in at random.

    Args:
        where: directory or hub name.
        source: the name that the user gave, for errors.
        options: passed to `from_pretrained`.

    Raises:
        UnsupportedModelError: weights are missing.
    """
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(where, output_loading_info=True, **options)
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        named = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
        raise UnsupportedModelError(
            f"{source} lacks {len(missing)} of the weights that its configuration asks for: {named}; "
            "expected a whole checkpoint: save or download it again"
        )
    return model
