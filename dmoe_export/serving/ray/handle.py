"""The `Wire` of Ray Serve: a handle of the deployment of replicas."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from ..asked import Ask
from .wire import FullError, LostError, NobodyError

_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError, TaskCancelledError,
         ReplicaUnavailableError)


class HandleStream:
    """A streaming call of `Replica.answer`."""

    def __init__(self, response: Any) -> None:
        self._response, self._over = response, False

    async def next(self) -> Any:
        """As `Stream.next`."""
        try:
            return await self._response.__anext__()
        except Exception as error:
            self._over = True  # `cancel` of such a one would raise it again
            if isinstance(error, BackPressureError):
                raise FullError from None
            if isinstance(error, DeploymentUnavailableError):
                raise NobodyError from None
            if isinstance(error, StopAsyncIteration):
                raise LostError("its answer broke off") from None
            if isinstance(error, _LOST):
                raise LostError(type(error).__name__) from None
            raise

    def cancel(self) -> None:
        """As `Stream.cancel`; Serve cancels the call in the replica, too."""
        if not self._over:
            with suppress(RayError, RayServeException):  # it failed meanwhile
                self._response.cancel()


class HandleWire:
    """Asks with a streaming handle, and tells by broadcast, which waits in no queue."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._asking = handle.options(stream=True, method_name="answer")

    def ask(self, ask: Ask) -> HandleStream:
        """As `Wire.ask`: to the replica that Serve's router chooses."""
        return HandleStream(self._asking.remote(ask))

    async def tell(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        """As `Wire.tell`."""
        try:
            told = await self._handle.broadcast(method, *arguments).results_async(timeout_s=seconds,
                                                                                 return_exceptions=True)
        except (TimeoutError, asyncio.TimeoutError, DeploymentUnavailableError, *_LOST):
            return []
        return [one for one in told if not isinstance(one, BaseException)]
