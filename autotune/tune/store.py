"""Plan files in the user's cache directory. A plan from disk is only a hint: a faulty one is a miss.

A file is written completely or not at all, read only if no other user could have written it, and parsed as strict JSON.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..errors import PlanError
from ..machine import cache_dir
from . import plan
from .fingerprint import Fingerprint
from .plan import Plan

FOLDER = "plans"
DOUBT = ".doubted"  # suffix of the file beside a plan that failed while it served
MAX_BYTES = 4 << 20  # largest plan file that is read; a plan with all its trials takes about 100 KB


def path_for(fingerprint: Fingerprint) -> Path | None:
    """Path of the plan file for `fingerprint`, existing or not; None if there is no cache.

    The name is a hash of the schema and the whole fingerprint, so any difference in them leads to another file.
    """
    folder = cache_dir.cache(FOLDER)
    key = json.dumps([plan.SCHEMA, asdict(fingerprint)], sort_keys=True)
    return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def save(value: Plan) -> Path | None:
    """Write a plan, also an empty one ("keep the original"). Returns its path, or warns once and returns None."""
    path = path_for(value.fingerprint)
    if path is None:
        return None
    text = plan.dumps(value)
    try:
        cache_dir.write(path, [text.encode()])
        path.with_suffix(DOUBT).unlink(missing_ok=True)  # the plan was proven again
    except OSError as error:
        cache_dir.warn_once(f"plans are not kept: {path.parent}: {error.strerror}; tuning starts afresh next time")
        return None
    return path


def trust(fingerprint: Fingerprint, doubt: str | None) -> None:
    """Record that the plan stored for `fingerprint` failed while it served, or clear that record.

    A recorded plan is not used. Saving a new plan under the same name clears the record, too.

    Args:
        fingerprint: the fingerprint of the plan.
        doubt: how the plan failed; None clears the record.
    """
    path = path_for(fingerprint)
    if path is None:
        return
    mark = path.with_suffix(DOUBT)
    try:
        if doubt is None:
            mark.unlink(missing_ok=True)
        else:
            cache_dir.write(mark, [json.dumps({"reason": doubt}).encode()])
    except OSError as error:
        cache_dir.warn_once(f"could not record that the plan failed: {mark.parent}: {error.strerror}")


def find(fingerprint: Fingerprint) -> Plan | None:
    """Load the plan stored for `fingerprint`, or None.

    A file that cannot be trusted or read is a miss. The warning is given once, because a process that waits for another
    one's plan asks twice a second.
    """
    path = path_for(fingerprint)
    if path is None:
        return None
    if (mark := path.with_suffix(DOUBT)).exists():
        cache_dir.warn_once(f"the stored plan {path} is not used: it failed while it served, see {mark}")
        return None
    try:
        content = cache_dir.read(path, MAX_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, PlanError) as error:
        cache_dir.warn_once(f"the stored plan {path} is ignored: {error}")
        return None
    try:
        found = plan.loads(content)
        if found.fingerprint != fingerprint:
            raise PlanError("it was made for another model, machine, version, workload or policy")
    except PlanError as error:
        cache_dir.warn_once(f"the stored plan {path} is set aside as {path.name}.refused: {error}")
        with suppress(OSError):  # on a read-only disk it stays, and is a miss again
            path.replace(path.with_name(f"{path.name}.refused"))
        return None
    return found
