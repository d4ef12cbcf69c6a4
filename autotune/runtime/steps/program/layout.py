"""Decide once where values are stored and when threads meet, from what each instruction reads and writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence

import torch

from .instruction import CODES, Instruction, Ref, Root, Share

ALIGN_BYTES = 64
ARENA = 0  # number of the base address of temporaries; the other roots follow by their numbers


def meetings(instructions: Sequence[Instruction]) -> list[bool]:
    """For each instruction, whether all threads have to meet before it.

    A thread may at once read what it wrote itself: solo after solo, and its own sequences after its own sequences. For
    everything else, threads must meet between the write and the read.
    """
    writer: dict[int, int] = {}
    meets, last = [], 0
    for i, instruction in enumerate(instructions):
        written = [writer[root] for root in instruction.reads if writer.get(root, -1) >= last]
        meet = any(instruction.share is Share.TEAM or instructions[j].share is not instruction.share for j in written)
        last = i if meet else last
        meets.append(meet)
        writer |= dict.fromkeys(instruction.writes, i)
    return meets


def place_temporaries(
    instructions: Sequence[Instruction], meets: Sequence[bool], roots: Sequence[Root]
) -> tuple[dict[int, int], int]:
    """Byte offsets of temporaries in one arena, and its size. Memory is reused as soon as no thread can be reading it.

    Until all threads have met, a thread may still run an earlier instruction. So memory that other threads touched is
    free for reuse only after the next barrier.
    """
    sizes = {r.number: -(-r.size_bytes // ALIGN_BYTES) * ALIGN_BYTES for r in roots if r.kind == "temporary"}
    touched: dict[int, list[int]] = {number: [] for number in sizes}
    for i, instruction in enumerate(instructions):
        for number in instruction.reads | instruction.writes:
            if number in touched:
                touched[number].append(i)
    last_meet, latest = [], -1
    for i, meet in enumerate(meets):
        latest = i if meet else latest
        last_meet.append(latest)

    def reusable(number: int, i: int) -> bool:
        alone = instructions[i].share is Share.SOLO
        foreign = [j for j in touched[number] if not (alone and instructions[j].share is Share.SOLO)]
        return all(j < last_meet[i] for j in foreign)

    offsets: dict[int, int] = {}
    free: list[tuple[int, int, int]] = []  # offset, size, the last root stored there
    end = 0
    ending: dict[int, list[int]] = {}
    for number, uses in touched.items():
        if uses:
            ending.setdefault(uses[-1], []).append(number)
    for i, instruction in enumerate(instructions):
        for number in sorted(instruction.writes):
            if number not in sizes or number in offsets:
                continue
            size = sizes[number]
            fits = [gap for gap in free if gap[1] >= size and reusable(gap[2], i)]
            if fits:
                gap = min(fits, key=lambda g: g[1])
                free.remove(gap)
                offsets[number] = gap[0]
                if gap[1] > size:
                    free.append((gap[0] + size, gap[1] - size, gap[2]))
            else:
                offsets[number], end = end, end + size
        free += [(offsets[number], sizes[number], number) for number in ending.get(i, ())]
    return offsets, end


def encode(instructions: Sequence[Instruction], meets: Sequence[bool], offsets: Mapping[int, int]) -> torch.Tensor:
    """The program as INT64 words; see kernels/program.cpp."""
    words, most = [0], ARENA  # the first word is the number of bases that the program needs
    for instruction, meet in zip(instructions, meets, strict=True):
        body: list[int] = []
        for word in instruction.words:
            if isinstance(word, Ref):
                inside = word.root in offsets
                base = ARENA if inside else word.root + 1 if word.root >= 0 else -1
                most = max(most, base)
                body += [base, word.offset_bytes + (offsets[word.root] if inside else 0)]
            elif isinstance(word, float):
                body += struct.unpack("q", struct.pack("d", word))
            else:
                body.append(int(word))
        words += [4 + len(body), CODES.index(instruction.code), int(instruction.share), int(meet), *body]
    words[0] = most + 1
    return torch.tensor(words, dtype=torch.int64, device="cpu")
