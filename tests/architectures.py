"""Every causal LM class of transformers, tiny, under every transform: right tokens, or a refusal before the trial.

    make test-architectures                                        all of them; half an hour or so
    make test-architectures ARCHITECTURES_ARGS="--only 'phi3;mamba2' --compile"
    make test-architectures ARCHITECTURES_ARGS="--resume"          those that a run before did not come to

A model is built from its class's own configuration, made small by `autotune.model.shrink`. Each transform is applied by
itself and answers three requests: a prompt, a longer one, a left-padded batch. Each architecture has a process of its
own with a time limit, so that a crash costs that one. The table is printed and written to out/architectures.md;
out/architectures.jsonl holds every result. Exit codes: 0 nothing was wrong, 1 something was.

    right       the original's tokens (lossless), or its distribution within `LOSSY_NATS`
    refused     by `Transform.unavailable`, before anything was tried; why
    LATE        by TransformError, when it was applied: no error, but `unavailable` should have known
    WRONG       other tokens
    ERROR       an exception that is not autotune's own
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from autotune.errors import AutotuneError, ChoiceError, TransformError
from autotune.machine import hardware, processor
from autotune.model import route, seam, shrink
from autotune.runtime import dispatch
from autotune.runtime.speculation.pace import evenly
from autotune.runtime.variant import Stage, Transform, Variant
from autotune.transforms import make, registry, speculation
from autotune.tune.choose import unavailable
from autotune.tune.supported import unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from autotune.machine.hardware import Hardware

NEW_TOKENS = 8
NEAR_TIE = 0.05  # nats between the original's two best tokens, below which either may come first
LOSSY_NATS = (
    4.0  # mean KL divergence beyond which a lossy transform gives garbage; what is better is the gate's to judge
)
LIMIT_S = 60.0  # for one architecture
COMPILED = {"compile_step", "compile_prefill"}  # tens of seconds each
QUICKER: dict[str, dict[str, Any]] = {"torchao": {"compile": False}}  # without --compile
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * (shrink.HEAD_SIZE // 2),
    "long_factor": [2.0] * (shrink.HEAD_SIZE // 2),
    "original_max_position_embeddings": 32,
    "factor": 4.0,
    "rope_theta": 10000.0,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # settings that are not the class's own, and make another model
    "falcon, ALiBi": ("falcon", {"alibi": True}),
    "falcon, old": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": False}),
    "phi3, longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "llama, dynamic": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}}),
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16}
SETTINGS: dict[str, dict[str, Any]] = {  # by model type, where its class's own configuration gives no tiny model
    # what checkpoints say and the class leaves out
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": ROPE | {"mrope_section": [4, 2, 2]}, "full_attention": None},
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp": INDEXER | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "qwen4_exp_text": INDEXER | {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "xmod": {"default_language": "en_XX"},
    # patches of several bytes are wider than a byte; its caches count layers that the class does not name
    "blt": {"num_hidden_layers": 2, "global_config": {"encoder_cross_output_size": 2 * shrink.WIDTH}},
    # positions in two dimensions do not fit a small width; buckets are drawn anew without a seed
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "hash_seed": 0},
    # half of a small width is rounded up in one place and not in another
    "xlstm": {"qk_dim_factor": 1.0},
    # shared layers are tied to the first one: there have to be two
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4},
}
OUT = Path("out")
GROUPS = {
    "weights": (Stage.WEIGHTS,),
    "attention": (Stage.ATTENTION,),
    "layers": (Stage.LAYERS,),
    "cache and loop": (Stage.CACHE, Stage.LOOP, Stage.THREADS, Stage.SPECULATION),
    "step": (Stage.COMPILE, Stage.GRAPH),
}
BAD = ("WRONG", "ERROR", "CRASH", "TIME-OUT")
ORDER = (*BAD, "LATE", "right", "refused")  # of outcomes in a cell, the worst first


@dataclass(frozen=True)
class Result:
    """What became of one transform on one architecture.

    Args:
        architecture: transformers' model type.
        transform: its name; "" for what concerns all of them.
        outcome: see the module's docstring, or "not built", "CRASH", "TIME-OUT".
        why: in words; "" where there is nothing to say.
    """

    architecture: str
    transform: str
    outcome: str
    why: str = ""


class Fallback:
    """A router as a wrapped model has it: what a variant cannot serve goes to the original."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.served = 0

    def sample(self, call: seam.Sampling) -> Any:
        if dispatch.unsupported(self.variant, call):
            return call.original()
        self.served += 1
        return dispatch.sample(self.variant, call)

    def forward(self, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return dispatch.forward(self.variant, model, args, kwargs)

    def other_loop(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


def requests() -> dict[str, dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(3, shrink.VOCABULARY, (3, 30), generator=draw)  # [3, 30]
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :7], mask[2, :3] = 0, 0
    return {
        "one prompt": {"input_ids": ids[:1, :10], "attention_mask": torch.ones(1, 10, dtype=torch.int64)},
        "a longer one": {"input_ids": ids[1:2], "attention_mask": torch.ones(1, 30, dtype=torch.int64)},
        "a left-padded batch": {"input_ids": ids[:, :12] * mask, "attention_mask": mask},
    }


def asked(transform: Transform) -> dict[str, dict[str, torch.Tensor]]:
    """The requests that say something about a transform: what exchanges layers one by one knows no lengths."""
    found = requests()
    return (
        found if transform.stage not in (Stage.WEIGHTS, Stage.LAYERS) else {"a left-padded batch": found.popitem()[1]}
    )


def answer(model: PreTrainedModel, inputs: dict[str, torch.Tensor], new: int = NEW_TOKENS) -> tuple[torch.Tensor, Any]:
    """Greedy tokens [B, N] and log-probabilities [B, N, V]."""
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1).log_softmax(-1)


def first_wrong_token(expected: torch.Tensor, log_probs: torch.Tensor, got: torch.Tensor) -> str | None:
    """Where greedy tokens part other than at a near-tie of the original; after a near-tie anything may follow.

    Args:
        expected, got: [B, N].
        log_probs: the original's, [B, N, V].
    """
    top = log_probs.topk(2).values  # [B, N, 2]
    for row in range(len(expected)):
        different = (expected[row] != got[row]).nonzero()
        if len(different):
            at = int(different[0])
            margin = float(top[row, at, 0] - top[row, at, 1])
            if margin > NEAR_TIE:
                was, is_now = int(expected[row, at]), int(got[row, at])
                return f"row {row}, token {at}: {is_now} instead of {was}, margin {margin:.2f}"
    return None


def far_off(expected: tuple[torch.Tensor, torch.Tensor], got: tuple[torch.Tensor, torch.Tensor]) -> str | None:
    """What a lossy answer has to be blamed for: its distributions as far as both wrote the same tokens."""
    same = (expected[0] == got[0]).long().cumprod(-1)  # [B, N]
    seen = torch.cat([torch.ones_like(same[:, :1]), same[:, :-1]], dim=1).bool()  # both had the same context
    kld = (expected[1].exp() * (expected[1] - got[1])).nan_to_num(0.0).sum(-1)[seen]
    if not bool(torch.isfinite(got[1].amax(-1)).all()):
        return "NaN or infinite logits"
    return f"mean KL divergence {float(kld.mean()):.2g}" if float(kld.mean()) > LOSSY_NATS else None


def built(architecture: str) -> PreTrainedModel:
    """A tiny model of a type.

    Raises:
        whatever its constructor or its first answer does.
    """
    kind, settings = VARIANTS.get(architecture, (architecture, SETTINGS.get(architecture, {})))
    model = shrink.small(*seam.causal_lm(kind), settings)
    if (reason := unsupported(model)) is not None:
        raise ValueError(reason)
    model.generation_config = seam.greedy_settings(0, [2])
    return model


def phases(name: str, compiled: bool) -> Iterator[Transform]:
    """A transform for each phase that it knows; what exchanges layers works alike in both."""
    alike = registry()[name].stage is Stage.WEIGHTS
    for phase in ("decode", "prefill"):
        try:
            yield make(name, {} if compiled else QUICKER.get(name, {}), phase)
        except ChoiceError:
            continue
        if alike:
            return


def examine(architecture: str, machine: Hardware, compiled: bool = False) -> Iterator[Result]:
    """Every transform on one architecture."""
    result = Result(architecture, "", "right")
    try:
        model = built(architecture)
        expected = {case: answer(model, inputs) for case, inputs in requests().items()}
        again = {case: answer(model, inputs) for case, inputs in requests().items()}
    except Exception as error:
        yield replace(result, outcome="not built", why=_first(error))
        return
    for case in expected:
        if first_wrong_token(*expected[case], again[case][0]):
            yield replace(result, outcome="not built", why=f"the original differs from itself on {case}")
            return
    for name in registry():
        if name in COMPILED and not compiled:
            continue
        for transform in phases(name, compiled):
            yield trial(Result(architecture, str(transform), ""), transform, model, machine, expected)
    for case, inputs in requests().items():
        if not torch.equal(answer(model, inputs)[0], expected[case][0]):
            yield replace(result, outcome="WRONG", why=f"the original itself, afterwards, on {case}")


def trial(
    result: Result,
    transform: Transform,
    model: PreTrainedModel,
    machine: Hardware,
    expected: Mapping[str, tuple[torch.Tensor, Any]],
) -> Result:
    """One transform by itself."""
    try:
        variant = Variant(model)
        if (reason := unavailable(transform, variant, machine)) is not None:
            return replace(result, outcome="refused", why=str(reason))
        try:
            costs = lambda made: evenly(made.speculation.tokens, 1.2)  # noqa: E731 - no matter whether guesses pay
            with mock.patch.object(speculation, "measure_costs", costs):
                variant = variant.with_transform(transform)
        except TransformError as refusal:
            return replace(result, outcome="LATE", why=_first(refusal))
        if (missing := transform.took_effect(variant)) is not None:
            return replace(result, outcome="LATE", why=f"it had no effect: {missing}")
        served = route.routed(model, Fallback(variant))
        for case, inputs in asked(transform).items():
            got = answer(served, inputs)
            wrong = first_wrong_token(*expected[case], got[0]) if transform.lossless else far_off(expected[case], got)
            if wrong is not None:
                return replace(result, outcome="WRONG", why=f"{case}: {wrong}")
    except Exception as error:
        kind = "ERROR" if not isinstance(error, AutotuneError) or error.__cause__ is not None else "LATE"
        return replace(result, outcome=kind, why=_first(error))
    return replace(result, outcome="right")


def _first(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _work(architecture: str, machine: Hardware, compiled: bool, results: Any) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)
    for result in examine(architecture, machine, compiled):
        results.send(result)
    results.send(None)


def ready() -> Hardware:
    """The machine, with everything imported and built that every process would import and build."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = hardware.probe("cpu")
    for _ in examine("llama", machine):
        pass
    return machine


def apart(architecture: str, machine: Hardware, compiled: bool, limit_s: float) -> list[Result]:
    """`examine` in a process of its own, which may die or hang."""
    context = multiprocessing.get_context("fork")  # everything is imported already, and no thread runs
    reader, writer = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(architecture, machine, compiled, writer), daemon=True)
    child.start()
    writer.close()
    found, end = list[Result](), time.monotonic() + limit_s
    try:
        while reader.poll(max(0.0, end - time.monotonic())):
            if (result := reader.recv()) is None:
                child.join()
                return found
            found.append(result)
        found.append(Result(architecture, "", "TIME-OUT", f"more than {limit_s:.0f} s, after {_last(found)}"))
    except EOFError:
        child.join()
        found.append(Result(architecture, "", "CRASH", f"exit code {child.exitcode}, after {_last(found)}"))
    finally:
        child.kill()
    return found


def _last(found: Sequence[Result]) -> str:
    return found[-1].transform if found else "nothing"


# The table


def group(transform: str) -> str:
    stage = registry()[transform.split("(")[0].split("@")[0]].stage
    return next(name for name, stages in GROUPS.items() if stage in stages)


def table(results: Sequence[Result]) -> list[str]:
    """A row for each architecture."""
    rows = dict[str, list[Result]]()
    for result in results:
        rows.setdefault(result.architecture, []).append(result)
    lines = [f"| architecture | {' | '.join(GROUPS)} |", "|---" * (1 + len(GROUPS)) + "|"]
    for name, found in sorted(rows.items()):
        whole = [r for r in found if not r.transform]
        if whole and len(found) == len(whole):
            lines.append(f"| {name} | {whole[0].outcome}: {_cell(whole[0].why)} |" + " |" * (len(GROUPS) - 1))
            continue
        cells = [_summary([r for r in found if r.transform and group(r.transform) == each]) for each in GROUPS]
        cells[-1] += "".join(f"; {r.outcome}: {_cell(r.why)}" for r in whole)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _summary(found: Sequence[Result]) -> str:
    """How many of a group's transforms came to what; for what is not right, which and why."""
    counts = Counter(r.outcome for r in found)
    said = [f"{counts[outcome]} {outcome}" for outcome in ORDER if counts[outcome]]
    bad = [f"{r.transform}: {_cell(r.why)}" for r in found if r.outcome in (*BAD, "LATE")]
    return "; ".join([", ".join(said), *bad]) or "-"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")[:160]


def reasons(results: Sequence[Result]) -> list[str]:
    """Why transforms were refused, and how many architectures each reason kept them from."""
    found = dict[tuple[str, str], set[str]]()
    for r in results:
        if r.outcome == "refused":
            why = r.why.replace(r.architecture, "it")
            found.setdefault((r.transform.split("(")[0].split("@")[0], why), set()).add(r.architecture)
    ordered = sorted(found.items(), key=lambda item: (item[0][0], -len(item[1])))
    lines = ["| transform | refused because | architectures |", "|---|---|---|"]
    for (transform, why), names in ordered:
        few = ", ".join(sorted(names)) if len(names) <= 6 else str(len(names))
        lines.append(f"| {transform} | {_cell(why)} | {few} |")
    return lines


def document(results: Sequence[Result]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in sorted(hardware.library_versions().items()))
    names = {r.architecture for r in results}
    unbuilt = {r.architecture for r in results if r.outcome == "not built"}
    counts = Counter(r.outcome for r in results if r.transform)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return "\n".join(
        [
            "# Architectures",
            "",
            f"Printed by `make test-architectures` on {today} on {platform.system()} ({processor.instruction_set()}),",
            f"with {versions}.",
            "",
            f"{len(names)} model types have a causal LM; {len(names) - len(unbuilt)} of them were built tiny and tried",
            f"with every transform by itself: {', '.join(f'{n} {o}' for o, n in counts.most_common())}.",
            "",
            *table(results),
            "",
            "## Why transforms are refused",
            "",
            *reasons(results),
            "",
        ]
    )


def read(path: Path) -> list[Result]:
    if not path.exists():
        return []
    return [Result(**json.loads(line)) for line in path.read_text().splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.architectures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="NAME[;NAME]", help="model types; default: all")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, which takes minutes for each")
    parser.add_argument("--resume", action="store_true", help="leave out what out/architectures.jsonl holds")
    parser.add_argument("--limit", type=float, default=LIMIT_S, metavar="S", help="seconds for one architecture")
    args = parser.parse_args(argv)
    known = sorted([*seam.causal_lms(), *VARIANTS])
    wanted = [name.strip() for name in args.only.split(";") if name.strip()] or known
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"no model type {', '.join(unknown)}; transformers has {', '.join(known)}")
    OUT.mkdir(exist_ok=True)
    path = OUT / "architectures.jsonl"
    results = [r for r in read(path) if args.only or args.resume]
    done = {r.architecture for r in results} if args.resume else set[str]()
    results = [r for r in results if args.resume or r.architecture not in wanted]
    machine = ready()
    for number, name in enumerate(wanted):
        if name in done:
            continue
        start = time.monotonic()
        found = apart(name, machine, args.compile, args.limit)
        results += found
        path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))
        counts = Counter(r.outcome for r in found)
        said = ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common())
        print(f"{number + 1}/{len(wanted)} {name}: {said} ({time.monotonic() - start:.0f} s)", flush=True)
        for r in found:
            if r.outcome in (*BAD, "LATE", "not built"):
                print(f"    {r.outcome} {r.transform} {r.why}", flush=True)
    text = document(results)
    (OUT / "architectures.md").write_text(text)
    print("", text, sep="\n")
    return int(any(r.outcome in BAD for r in results if r.architecture in wanted))


if __name__ == "__main__":
    sys.exit(main())
