"""A module's forward compiled for any length of prompt, with a limit on recompilations.

Torch compiles again if a call differs in something that it assumed constant: one row or several, a mask or none. A few
recompilations are normal. If a model differed at every call, torch would compile without end, or run it uncompiled
without a warning. Here it runs uncompiled after a limit, and the reason is reported.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ...errors import TransformError
from ...machine import forking, outside
from ...model import seam
from .compiled import require_private_cache

if TYPE_CHECKING:
    from torch.fx import GraphModule
    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

MOST_COMPILATIONS = 8  # largest number of calls that compile; torch's own limit (dynamo's `recompile_limit`)


class Recompiling:
    """The forward of one module, compiled with dynamic shapes.

    Args:
        module: the module whose forward it is; its weights are not copied.

    Attributes:
        compilations: number of calls that compiled something.
        given_up: why all calls run uncompiled from now on, or None.
    """

    is_of_one_module = True  # twins of the module do without it

    def __init__(self, module: PreTrainedModel) -> None:
        self.plain = module.forward
        self.compilations = 0
        self.given_up: str | None = None
        self._graphs = 0
        self._module = module
        self._lock = forking.lock()  # only one thread compiles at a time
        compiler: Any = torch.compile  # torch's stubs do not know the last argument
        self._compiled = compiler(self.plain, dynamic=True, backend=self._compile, isolate_recompiles=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.given_up is not None:
            return self.plain(*args, **kwargs)
        with self._lock:
            before = self._graphs
            out = self._compiled(*args, **kwargs)
            self._note(self._graphs > before)
        return out

    def try_out(self, lengths: tuple[int, ...], device: torch.device) -> None:
        """Compile now, for prompts of several lengths.

        Raises:
            TransformError: it cannot be compiled, it is compiled again for each length, or others can write to the
                compiler's cache.
        """
        require_private_cache()
        for length in lengths:
            ids = torch.zeros(1, length, dtype=torch.int64, device=device)
            positions = torch.arange(length, dtype=torch.int64, device=device)[None]  # [1, P]
            given: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "position_ids": positions}
            given |= seam.last_logits(self._module, 1)  # the arguments that generate passes
            try:
                with torch.no_grad():
                    self(input_ids=ids, return_dict=True, **seam.over(self._module, seam.growing_cache()), **given)
            except Exception as error:  # dynamo, inductor and the compiler behind it may raise anything
                outside.pass_on(error)
                first = " ".join(str(error).split("\n\n")[0].split())
                raise TransformError(f"prefill does not compile: {type(error).__name__}: {first}") from error
        if self.compilations > 1:
            raise TransformError(f"prefill is compiled for each length of prompt: {self.compilations} times already")

    def _compile(self, graph: GraphModule, inputs: list[torch.Tensor]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self._graphs += 1
        return compile_fx(graph, inputs)

    def _note(self, compiled: bool) -> None:
        self.compilations += compiled
        if self.compilations > MOST_COMPILATIONS:
            self.given_up = f"compiled {self.compilations} times"
            log.warning("prefill runs uncompiled from now on: %s, each time for another kind of call", self.given_up)
