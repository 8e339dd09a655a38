"""What the gateway's live page asks of the controller."""

from __future__ import annotations

from typing import Any

import httpx

from cluster.errors import RequestError

_VERB_TIMEOUT_S = 330.0  # a change of the placement takes as long as its weights take to load, at most 300 s


class ControllerSource:
    """The page's `Source`: observations through Ray, verbs through the admin API, which checks the key."""

    def __init__(self, controller: Any) -> None:
        """`controller`: its handle, or what stands for one."""
        self._controller = controller
        self._admin_address = ""

    async def observe(self, known_epoch: int, known_event: int) -> dict[str, Any]:
        """See `cluster.control.observation.observe`."""
        seen: dict[str, Any] = await self._controller.observe.remote(known_epoch, known_event)
        self._admin_address = seen.pop("admin_address")
        return seen

    async def operate(self, path: str, body: Any, key: str) -> tuple[int, Any]:
        """POST to the admin API: its status and answer. RequestError where it cannot be reached."""
        if not self._admin_address:
            raise RequestError("The controller's admin API is not known yet", code="not_ready", status=503)
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with httpx.AsyncClient(timeout=_VERB_TIMEOUT_S, trust_env=False) as client:
                answer = await client.post(f"http://{self._admin_address}{path}", json=body, headers=headers)
            return answer.status_code, answer.json()
        except (httpx.HTTPError, ValueError) as error:
            message = f"The controller's admin API did not answer: {type(error).__name__}"
            raise RequestError(message, code="not_ready", status=502) from error
