"""Where the admin API listens, known without what serves it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdminOptions:
    """Where the admin API listens, and what it asks for."""

    host: str
    port: int  # 0: any free one
    token: str
