"""Plan files on disk, in the user's cache directory. A plan from disk is a hint: whatever is wrong with it is a miss.

A file is written whole or not at all, read only where nobody else could have written it, and parsed as strict JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ..errors import PlanError
from ..machine import cache_dir
from . import plan
from .fingerprint import Fingerprint
from .plan import Plan

logger = logging.getLogger("autotune")

FOLDER = "plans"
DOUBT = ".doubted"  # beside a plan that failed while it served
MAX_BYTES = 4 << 20  # a plan with all its trials is some 100 KB


def path_for(fingerprint: Fingerprint) -> Path | None:
    """Where the plan for `fingerprint` is or would be; None where there is no cache.

    The name is a hash of the schema and the whole fingerprint, so that any difference, and any other schema, is another
    file.
    """
    folder = cache_dir.cache(FOLDER)
    key = json.dumps([plan.SCHEMA, asdict(fingerprint)], sort_keys=True)
    return folder and folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.json"


def save(value: Plan) -> Path | None:
    """Write a plan, an empty one ("keep the original") as well. None with one warning where that is not possible."""
    path = path_for(value.fingerprint)
    if path is None:
        return None
    text = plan.dumps(value)
    try:
        cache_dir.write(path, [text.encode()])
        path.with_suffix(DOUBT).unlink(missing_ok=True)  # it was proven anew
    except OSError as error:
        cache_dir.warn_once(f"plans are not kept: {path.parent}: {error.strerror}; tuning starts afresh next time")
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
            cache_dir.write(mark, [json.dumps({"reason": doubt}).encode()])
    except OSError as error:
        cache_dir.warn_once(f"could not record that the plan failed: {mark.parent}: {error.strerror}")


def find(fingerprint: Fingerprint) -> Plan | None:
    """The plan stored for `fingerprint`, or None; a file that cannot be trusted or read is a miss with one warning."""
    path = path_for(fingerprint)
    if path is None:
        return None
    if (mark := path.with_suffix(DOUBT)).exists():
        logger.warning("the stored plan %s is not used: it failed while it served, see %s", path, mark)
        return None
    try:
        content = cache_dir.read(path, MAX_BYTES)
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
