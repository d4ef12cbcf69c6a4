"""Plan files on disk, in the user's cache directory. A plan from disk is a hint: whatever is wrong with it is a miss.

A file is written whole or not at all, read only where nobody else could have written it, and parsed as strict JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from . import folders, plan
from .errors import PlanError
from .plan import Fingerprint, Plan

logger = logging.getLogger("autotune")

FOLDER = "plans"
DOUBT = ".doubted"  # beside a plan that failed while it served
MAX_BYTES = 4 << 20  # a plan with all its trials is some 100 KB


def path_for(fingerprint: Fingerprint) -> Path | None:
    """Where the plan for `fingerprint` is or would be; None where there is no cache.

    The name is a hash of the schema and the whole fingerprint, so that any difference, and any other schema, is another
    file.
    """
    folder = folders.cache(FOLDER)
    key = json.dumps([plan.SCHEMA, asdict(fingerprint)], sort_keys=True)
    return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def save(value: Plan) -> Path | None:
    """Write a plan, an empty one ("keep the original") as well. None with one warning where that is not possible."""
    path = path_for(value.fingerprint)
    if path is None:
        return None
    text = plan.dumps(value)
    try:
        _write(path, text.encode())
        path.with_suffix(DOUBT).unlink(missing_ok=True)  # it was proven anew
    except OSError as error:
        folders.warn_once(f"plans are not kept: {path.parent}: {error.strerror}; tuning starts afresh next time")
        return None
    return path


def trust(fingerprint: Fingerprint, doubt: str | None) -> None:
    """Remember that the plan stored for `fingerprint` failed while it served, and is not to be used; or, without a
    `doubt`, that it may be again. A search that is saved under the same name lifts the doubt, too."""
    path = path_for(fingerprint)
    if path is None:
        return
    mark = path.with_suffix(DOUBT)
    try:
        if doubt is None:
            mark.unlink(missing_ok=True)
        else:
            _write(mark, json.dumps({"reason": doubt}).encode())
    except OSError as error:
        folders.warn_once(f"that a plan failed is not remembered: {mark.parent}: {error.strerror}")


def find(fingerprint: Fingerprint) -> Plan | None:
    """The plan stored for `fingerprint`, or None; a file that cannot be trusted or read is a miss with one warning."""
    path = path_for(fingerprint)
    if path is None:
        return None
    if (mark := path.with_suffix(DOUBT)).exists():
        logger.warning("the stored plan %s is not used: it failed while it served, see %s", path, mark)
        return None
    try:
        content = _read(path)
    except FileNotFoundError:
        return None
    except (OSError, PlanError) as error:
        logger.warning("the stored plan %s is ignored: %s", path, error)
        return None
    try:
        found = plan.loads(content)
        if found.fingerprint != fingerprint:
            raise PlanError("it was made for another model, machine, version, workload or policy")
    except PlanError as error:
        logger.warning("the stored plan %s is set aside as %s.refused: %s", path, path.name, error)
        with suppress(OSError):  # on a read-only disk it stays; it is a miss either way
            path.replace(path.with_name(f"{path.name}.refused"))
        return None
    return found


def _write(path: Path, content: bytes) -> None:
    """All or nothing, also when the process or the machine dies: a private temporary file, synced, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _read(path: Path) -> bytes:
    """The content of a regular, reasonably small file that only this user can have written.

    Raises:
        OSError: it cannot be opened, or is a link or a directory; FileNotFoundError: there is none.
        PlanError: the file or its directory is not this user's alone, is no regular file, or is too large.
    """
    _require_private(os.stat(path.parent), "its directory")
    with open(path, "rb", opener=_open_unlinked) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise PlanError("it is not a regular file")
        _require_private(status, "it")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise PlanError(f"it is larger than {MAX_BYTES >> 20} MB")
    return content


def _open_unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not block


def _require_private(status: os.stat_result, what: str) -> None:
    if status.st_uid != os.getuid():
        raise PlanError(f"{what} belongs to user {status.st_uid}, not to this one")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PlanError(f"{what} can be written by other users; expected mode 0600, and 0700 for the directory")
