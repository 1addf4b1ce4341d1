"""Packages that are installed and not used say nothing: transformers and accelerate import them all the same."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Loggers that warn while their package is imported: of what 4-bit layers on a CPU could use, of what DeepSpeed runs on.
_AT_IMPORT = ("bitsandbytes.backends.cpu.ops", "DeepSpeed")


def _is_serious(record: logging.LogRecord) -> bool:
    return record.levelno > logging.WARNING


@contextmanager
def without_messages() -> Iterator[None]:
    """No warnings of packages that are only imported."""
    loggers = [logging.getLogger(name) for name in _AT_IMPORT]
    for logger in loggers:
        logger.addFilter(_is_serious)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_is_serious)


with without_messages():
    import transformers.trainer  # noqa: F401 (which imports them, here for the first time)
