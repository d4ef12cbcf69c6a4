"""Identifies what a plan is valid for: configuration and weights of the model, machine, libraries, kind of work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UnsupportedModelError
from ..machine import intraop
from ..model import seam, sharding, stateful
from ..model.configured import TRANSIENT
from ..runtime.ranks.leading import LEADER

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..machine.hardware import Hardware
    from ..workload import Workload
    from .policy import Policy

PART = "fingerprint"  # the question to the ranks of a sharded model that `of_part` answers
# attributes of a layer of PEFT that say which of its tensors count, and how much
OF_ADAPTERS = ("active_adapters", "merged_adapters", "disable_adapters", "scaling")
COLUMNS = 4096  # 8-byte words in a row of the grid that a tensor's bytes are laid out in


@dataclass(frozen=True)
class Fingerprint:
    """What a plan is valid for. A plan with any difference is a miss.

    Args:
        model: hash of configuration and weights.
        hardware: device, name, capability, threads.
        versions: torch, transformers, autotune, ... by name.
        workload: hash of the workload's shape.
        policy: policy name and content hash.
        tier: quality tier.
    """

    model: str
    hardware: str
    versions: Mapping[str, str]
    workload: str
    policy: str
    tier: str


def of(
    model: PreTrainedModel,
    hardware: Hardware,
    workload: Workload,
    policy: Policy,
    draft: PreTrainedModel | None = None,
) -> Fingerprint:
    """Compute the fingerprint of a plan for this model, machine, workload, policy and draft.

    Raises:
        UnsupportedModelError: the model's weights cannot be read.
    """
    drafted = {} if draft is None else {"draft model": of_model(draft)}
    return Fingerprint(
        model=of_model(model),
        hardware=f"{hardware.device}, {hardware.name}, {hardware.capability}, {hardware.threads} threads",
        versions={**hardware.versions, "autotune": _own_version()} | drafted,
        workload=workload.shape_key(),
        policy=f"{policy.name}:{_of_policy(policy)}",
        tier=policy.tier,
    )


def of_model(model: PreTrainedModel) -> str:
    """Hash what a model computes: class, configuration, and the content of every parameter and buffer.

    A tensor's bytes are laid out as a grid of 64-bit words. All row and column sums (wrapping) go into a BLAKE2 hash,
    with names, shapes and dtypes. That reads the weights at memory speed; BLAKE2 alone would take seconds per gigabyte.
    Any single changed word changes two sums, and moved words change the sums of their rows or columns. Weights that
    were trained further, merged, quantised or permuted would have to agree in thousands of independent 64-bit sums by
    chance. The hash does not protect against someone who constructs weights with equal sums; that person could change
    the model anyway.

    Of a model that is sharded, each rank hashes its own part, and the hash of all parts is the same on every rank.

    Args:
        model: on any device except "meta"; routed or not.

    Raises:
        UnsupportedModelError: a tensor's content cannot be read.
    """
    own = of_part(model)
    if (leader := LEADER.get()) is None:
        return own
    parts = leader.ask(PART, own)
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=16).hexdigest()


def of_part(model: PreTrainedModel) -> str:
    """Hash what this process holds of a model; see `of_model`.

    Raises:
        UnsupportedModelError: a tensor's content cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    cls = seam.bare_class(model)
    digest.update(f"{cls.__module__}.{cls.__qualname__}\n".encode())
    config = {"attention": seam.attention_of(model), **_without_transient(model.config.to_dict())}
    digest.update(json.dumps(config, sort_keys=True, default=lambda value: type(value).__name__).encode())
    seen: dict[int, str] = {}
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            first = seen.setdefault(id(tensor), name)
            digest.update(f"\n{name} {first} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            if first == name:  # a tied weight counts once
                for part in content(name, sharding.local(tensor)):
                    digest.update(part)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "merged_adapters", None), list):
            state = json.dumps([getattr(module, key, None) for key in OF_ADAPTERS], sort_keys=True, default=str)
            digest.update(f"\n{name} {state}".encode())
    return digest.hexdigest()


def _named_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, except those that the forward writes: they do not define what it computes."""
    state = stateful.of(model)
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        module, _, attribute = name.rpartition(".")
        if not state.writes(module, attribute):
            yield name, tensor


def content(name: str, tensor: torch.Tensor) -> Iterator[bytes]:
    """Yield the sums that stand for a tensor's bytes; see `of_model`.

    Raises:
        UnsupportedModelError: the content cannot be read.
    """
    if hasattr(tensor, "__tensor_flatten__"):  # e.g. torchao's quantised weights
        inner, _ = tensor.__tensor_flatten__()
        for attribute in inner:
            yield from content(f"{name}.{attribute}", getattr(tensor, attribute))
        return
    if tensor.is_meta or tensor.layout != torch.strided:
        raise UnsupportedModelError(
            f"{name} is a {tensor.layout} tensor on {tensor.device}, whose content cannot be read; "
            "expected dense weights: load the model fully (without device_map offloading) first"
        )
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    rows = data.numel() // (8 * COLUMNS)
    words = data[: rows * 8 * COLUMNS]
    if words.data_ptr() % 8:
        words = words.clone()
    if rows:
        grid = words.view(torch.int64).reshape(rows, COLUMNS)
        with intraop.computing_with(1):  # reads at memory speed; on a busy machine, a team waits at each of many sums
            columns, lines = _bytes(grid.sum(0)), _bytes(grid.sum(1))
        yield from (columns, lines)
    yield _bytes(data[rows * 8 * COLUMNS :])


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().numpy().tobytes())


def _without_transient(value: Any) -> Any:
    """Remove paths and values that change from load to load from the configuration, at any depth."""
    if isinstance(value, dict):
        return {str(k): _without_transient(v) for k, v in value.items() if k not in TRANSIENT}
    if isinstance(value, (list, tuple)):
        return [_without_transient(v) for v in value]
    return sorted(value) if isinstance(value, (set, frozenset)) else value


def _of_policy(policy: Policy) -> str:
    content = {key: value for key, value in asdict(policy).items() if key != "source"}
    text = json.dumps(content, sort_keys=True, default=sorted)  # frozensets, in a stable order
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _own_version() -> str:
    try:
        return metadata.version("autotune-inference")
    except metadata.PackageNotFoundError:  # a source checkout that is not installed
        return "source"
