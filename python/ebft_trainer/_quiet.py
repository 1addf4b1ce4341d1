"""Packages that are installed and not used say nothing: transformers and accelerate import them all the same."""

from __future__ import annotations

import logging
import sys

# Package -> its logger that warns during the import: of what 4-bit layers on a CPU could use, of what it runs on.
_AT_IMPORT = {"bitsandbytes": "bitsandbytes.backends.cpu.ops", "deepspeed": "DeepSpeed"}


def _is_imported_now(package: str) -> bool:
    # The mark that Python's own import statement goes by to wait for another thread's import.
    return bool(getattr(getattr(sys.modules.get(package), "__spec__", None), "_initializing", False))


def keep_quiet() -> None:
    """From now on, no warnings of packages while they are imported; what they say later comes through."""
    for package, name in _AT_IMPORT.items():
        logging.getLogger(name).addFilter(
            lambda record, package=package: record.levelno > logging.WARNING or not _is_imported_now(package)
        )
