"""What went wrong, from errors that Ray wrapped."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError

from cluster.errors import ExpertMeshError

_FURTHER = "For further information visit"  # pydantic's last line


def reason(error: Exception) -> str:
    """The cause of an error that Ray wrapped, in one line."""
    if isinstance(error, RayTaskError) and error.cause is not None:
        cause = error.cause
        return str(cause) if isinstance(cause, ExpertMeshError) else f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and _FURTHER not in line]
    if isinstance(error, RayActorError) and len(lines) > 1:
        exits = [line for line in lines if "exit" in line.lower()]
        return (exits or lines)[-1]
    return lines[-1] if lines else type(error).__name__
