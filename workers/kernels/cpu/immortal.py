"""What is never freed: a thread that waits in a kernel goes on while the interpreter ends, and reads it to the last."""

from __future__ import annotations

import ctypes
from typing import Any, TypeVar

Held = TypeVar("Held")

_keep: Any = ctypes.pythonapi.Py_IncRef
_keep.argtypes, _keep.restype = (ctypes.py_object,), None


def immortal(held: Held) -> Held:
    """`held`, whose memory stays where it is."""
    _keep(held)
    return held
