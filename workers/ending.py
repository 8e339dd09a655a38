"""How a process ends that lacks a part it cannot do without: at once, and Ray starts another."""

from __future__ import annotations

import logging
import os


def end_process(log: logging.Logger, why: str, error: BaseException) -> None:
    """Say in `log` why, with where `error` came from, and end this process with status 1, whatever else runs in it."""
    log.critical("%s", why, exc_info=error)
    logging.shutdown()
    os._exit(1)
