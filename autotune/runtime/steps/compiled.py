"""One decode step compiled ahead of time: no Python, no guards, decoder layers generated once.

A step is compiled for exactly one batch size, number of slots and number of tokens. It has no guards, so the caller
checks shapes by looking it up in `CompiledStep.fitting`. For other shapes, the same module runs uncompiled. Compiled
code is kept in the user's cache directory under a key of everything that shaped it: modules, libraries, processor,
threads.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...errors import TransformError, first_line
from ...machine import cache_dir, forking, hardware, outside, processor
from ...machine import device as devices
from ...model import seam
from ...model.configured import text_config
from ...model.revision import REGION
from ..cache.slot_forward import forward, run
from ..cache.slots import Layout, SlotCache
from .step import DecodeSteps, Step

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("autotune")

LEAN = {"size_asserts": False, "alignment_asserts": False}  # Python asserts on kernels' arguments take 0.5 ms a token
MOST_BYTES = 1 << 30  # largest size of a step's compiled code

_regions = forking.lock()  # held while a class has a forward that is compiled as a region
# On a GPU a matrix times a vector reaches the memory's bandwidth only with coordinate descent (see the comment in
# torch._inductor.decomposition.mm). Without it weights in 8 bits are widened into a tensor of 16 bits that is then
# multiplied: five bytes a weight instead of one. As an option of a compilation: inductor's flags are the process's.
OPTIONS: dict[str, dict[str, Any]] = {"cpu": {}, "cuda": {"coordinate_descent_tuning": True}}
MODES: dict[str, dict[str, bool]] = {  # torch's options for these modes; see torch._inductor.list_mode_options
    "default": {},
    "max-autotune": {"max_autotune": True, "coordinate_descent_tuning": True},
    "reduce-overhead": {"triton.cudagraphs": True},
}


class CompiledStep(DecodeSteps):
    """Compiled decode steps of one module, by the layout of a cache.

    Args:
        module: the decode module; its weights are passed by reference, never copied into the code.
        regions: trace every decoder layer as one nested region, so that its code is generated once for all layers.
        mode: "default" or "max-autotune".
    """

    def __init__(self, module: PreTrainedModel, regions: bool = True, mode: str = "default") -> None:
        self.module = module
        self.regions = regions
        self.mode = mode
        self._steps: dict[tuple[Layout, int], Callable[..., torch.Tensor]] = {}  # by layout and tokens
        self._lock = forking.lock()  # compiled code runs one step at a time

    def prepare(self, cache: SlotCache, tokens: int = 1) -> None:
        """Compile for this cache's layout, or load code that was compiled before.

        Args:
            tokens: K, tokens of a sequence that the step takes at once; logits are [B, K, V] if K is more than one.

        Raises:
            TransformError: the module cannot be compiled; the message says why.
        """
        if (cache.layout, tokens) in self._steps:
            return
        token = torch.zeros(cache.valid.shape[0], tokens, dtype=torch.int64, device=cache.slot.device)
        arguments = (self.module, token, token.clone(), cache.slot, cache.valid, cache.keys, cache.values)
        path = artifact(self.module, (*cache.layout, tokens), self.regions, self.mode)
        compiled = load(path) if path is not None else None
        if compiled is None:
            compiled = compile_ahead(arguments, self.regions, self.mode)
            if path is not None:
                keep(compiled, path)
        compiled.disable_guard_check()
        self._steps[cache.layout, tokens] = compiled.fn

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(batch, slots) of every compiled step of one token."""
        return tuple(dict.fromkeys((batch, slots) for (batch, slots, *_), tokens in self._steps if tokens == 1))

    def forget(self) -> None:
        """Do nothing: compiled code receives every address when it is called."""

    def fitting(self, cache: SlotCache, tokens: int = 1) -> Step | None:
        """The step compiled for this cache's layout and this number of tokens, or None."""
        compiled = self._steps.get((cache.layout, tokens))
        if compiled is None:
            return None

        def step(token: torch.Tensor, position: torch.Tensor, cache: SlotCache) -> torch.Tensor:
            with self._lock:
                return compiled(self.module, token, position, cache.slot, cache.valid, cache.keys, cache.values)

        return step


def compile_ahead(arguments: tuple[Any, ...], regions: bool, mode: str = "default") -> Any:
    """Compile `run` for these arguments, or `forward` if they are several tokens, as one graph.

    Raises:
        TransformError: the step cannot be traced as one graph, the compiler failed, or others can write to its cache.
    """
    options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
    options |= LEAN | OPTIONS[arguments[1].device.type] | MODES[mode]
    require_private_cache()
    try:
        with torch.no_grad(), layers_as_regions(arguments[0], regions):
            work = run if arguments[1].shape[1] == 1 else forward
            function: Any = torch.compile(work, fullgraph=True, dynamic=False, options=options)
            return function.aot_compile((arguments, {}))
    except Exception as error:  # dynamo, inductor and the C++ compiler may raise anything
        outside.pass_on(error)
        raise TransformError(f"the decode step does not compile: {first_line(error)}") from error


def require_private_cache() -> None:
    """Refuse inductor's default cache in /tmp if others can write to it, because code in it is run.

    Anyone can guess the name of this directory and create it first. A directory that $TORCHINDUCTOR_CACHE_DIR names is
    not checked.

    Raises:
        TransformError: others can write to it.
    """
    from torch._inductor.runtime import cache_dir_utils as inductor

    own = Path(inductor.default_cache_dir())
    with suppress(FileExistsError):
        own.mkdir(mode=0o700, parents=True)
    try:
        if Path(inductor.cache_dir()) == own:
            cache_dir.require_private(own)
    except OSError as error:
        raise TransformError(
            f"torch.compile's cache cannot be trusted: {error}; set TORCHINDUCTOR_CACHE_DIR to a private one"
        ) from error


@contextmanager
def layers_as_regions(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Within this context, every decoder layer is traced as one nested region."""
    layers = text_config(model).num_hidden_layers
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not wanted or not stacks:
        yield
        return
    kind = type(stacks[0][0])
    with _regions:  # who puts back what another compilation had put there would leave it for good
        forward = kind.forward
        kind.forward = torch.compiler.nested_compile_region(forward)
        setattr(kind.forward, REGION, forward)  # other models of this class have not changed
        try:
            yield
        finally:
            kind.forward = forward


def artifact(module: PreTrainedModel, layout: tuple[object, ...], regions: bool, mode: str = "default") -> Path | None:
    """The path of this step's compiled code, or None without a private cache directory or the model's source.

    Args:
        layout: of the cache, and the number of tokens.
    """
    folder = cache_dir.cache("steps")
    if folder is None:
        return None
    seen = hashlib.blake2b(digest_size=16)
    try:
        for part in _ingredients(module):
            seen.update(part.encode() + b"\0")
    except (OSError, TypeError):  # a class of a notebook, or one that was made by `type`
        return None
    seen.update(repr((layout, regions, sorted(LEAN.items()), OPTIONS, mode, torch.get_num_threads())).encode())
    return folder / f"{seen.hexdigest()}.step"


def _ingredients(module: PreTrainedModel) -> Iterator[str]:
    """Yield everything that shapes the generated code. The values of weights do not."""
    yield from sorted(f"{name} {version}" for name, version in hardware.library_versions().items())
    yield processor.instruction_set() + processor.instruction_sets()
    identity = devices.of(module).identity()
    yield f"{identity.name} {identity.capability} {torch.version.cuda}"
    yield module.config.to_json_string(use_diff=False)
    yield f"{seam.attention_of(module)} {seam.experts(module)}"  # the configuration's JSON does not have them
    yield inspect.getsource(inspect.getmodule(run) or run)
    for kind in sorted({type(m) for m in module.modules()}, key=lambda k: (k.__module__, k.__qualname__)):
        yield f"{kind.__module__}.{kind.__qualname__}"
        yield inspect.getsource(kind)
    for name, part in module.named_modules():
        yield f"{name} {type(part).__qualname__} {part.extra_repr()}"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.device}"


def load(path: Path) -> Any | None:
    """Load compiled code from an earlier process, or None. Only this user's files that others cannot write are read."""
    try:
        content = cache_dir.read(path, MOST_BYTES)
        return torch.compiler.load_compiled_function(io.BytesIO(content), f_globals=run.__globals__)
    except FileNotFoundError:
        return None
    except Exception as error:  # a damaged file must cost no more than a compilation
        log.warning("compiled step %s could not be loaded (%s); compiling anew", path.name, error)
        return None


def keep(compiled: Any, path: Path) -> None:
    """Save compiled code for the next process. If the disk is full or read-only, that process compiles again."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        cache_dir.sweep(path.parent.glob("*.tmp"))
        compiled.save_compiled_function(str(draft))
        draft.chmod(0o600)
        draft.replace(path)
    except Exception as error:
        draft.unlink(missing_ok=True)
        log.warning("the compiled step could not be kept: %s", error)
