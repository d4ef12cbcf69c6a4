"""A recorded baseline as values; `folder` describes its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ...validate.texts import Text
from ...workload import Bucket
from .compact import Compact
from .tasks import Suite


@dataclass(frozen=True)
class Subject:
    """The model that was recorded.

    Args:
        name: its name.
        kind: class name.
        fingerprint: hash of configuration and weights; see `autotune.tune.fingerprint`.
        dtype: dtype of its logits, such as "float32".
        vocabulary: width of its logits.
        tokenizer: hash of the tokenizer; empty without one.
        weights_bytes: bytes of weights in the modules that served.
        transforms: transforms that were applied when it was timed.
    """

    name: str
    kind: str
    fingerprint: str
    dtype: str
    vocabulary: int
    tokenizer: str
    weights_bytes: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Environment:
    """The machine and the libraries. Latency is compared only if everything except the versions agrees."""

    device: str
    name: str
    capability: str
    threads: int
    versions: Mapping[str, str]

    def machine(self) -> str:
        return f"{self.device}, {self.name}, {self.capability}, {self.threads} threads"


@dataclass(frozen=True)
class LatencySamples:
    """How long requests of one shape took.

    Args:
        bucket: batch, prompt and new tokens.
        samples_s: seconds by metric: "ttft", "tpot", "end_to_end".
        noise: A/A half-width of the machine at the time, a fraction.
    """

    bucket: Bucket
    samples_s: Mapping[str, tuple[float, ...]]
    noise: float


@dataclass(frozen=True)
class Questions:
    """The exam without its answers; see `validate.exam.Exam`."""

    size: str
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    noise_kld: float
    tie_nats: float
    prompts: tuple[tuple[int, ...], ...]
    texts: tuple[Text, ...]
    batches: tuple[tuple[Text, ...], ...]
    long: tuple[Text, ...]

    @property
    def groups(self) -> tuple[tuple[Text, ...], ...]:
        """Groups of texts that were scored together, in the order of the exam."""
        return (*((t,) for t in self.texts), *self.batches, *((t,) for t in self.long))

    @property
    def read(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the whole texts that are read to compare layers."""
        return tuple(text.context + text.scored for text in self.texts)


@dataclass(frozen=True)
class Baseline:
    """The record of a model.

    Args:
        subject, environment: the recorded model, and the machine.
        questions: texts of the exam.
        answers: for each group of the exam, the distributions of its scored tokens [B x T], sequence by sequence.
        layers: stage name -> sketches [tokens, WIDTH].
        pace: latency by bucket; empty if it was not recorded.
        suites: labelled tasks and their outcomes.
        created: ISO 8601, UTC.
        stepped: like `answers`, computed in one decoding step per token; empty for a model in FP32.
    """

    subject: Subject
    environment: Environment
    questions: Questions
    answers: tuple[Compact, ...]
    layers: Mapping[str, torch.Tensor]
    pace: tuple[LatencySamples, ...] = ()
    suites: tuple[Suite, ...] = ()
    created: str = ""
    stepped: tuple[Compact, ...] = ()
