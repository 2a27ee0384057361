"""A bundle as a model of Triton's Python backend; `dmoe-export deploy triton` writes what imports this.

An instance is a process: Triton calls `execute` in its main thread, answers are sent from an event loop in a second,
and the engine decodes in a third, which asks before each forward whether a client has left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from concurrent.futures import Future, wait
from typing import Any

import triton_python_backend_utils as pb_utils

from ...errors import DmoeError
from ...words import count, visible
from ..metrics import Metrics
from ..opening import open_engine
from .metrics import TritonMetrics
from .request import Wanted, wanted_of
from .sender import Sender
from .settings import check_device, choose_device, settings_of
from .tensors import check_tensors, inputs_of

_LAST_SECONDS = 2.0  # for answers of cancelled requests to be sent


class TritonPythonModel:
    """What Triton's Python backend calls; its errors while loading are TritonModelException with one sentence."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle that config.pbtxt names."""
        config, kind = json.loads(args["model_config"]), args["model_instance_kind"]
        parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        name = args["model_name"]
        logging.getLogger("dmoe_export").addHandler(_ToTriton())
        try:
            check_tensors()
            self._settings = settings = settings_of(parameters, kind)
            choose_device(kind, int(args["model_instance_device_id"]))
            metrics = _metrics(name, args["model_version"], args["model_instance_name"])
            self._engine = open_engine(name, settings.bundle, slots=settings.max_batch, metrics=metrics,
                                       max_waiting=settings.max_waiting, prefix_cache=settings.prefix_cache,
                                       memory=settings.memory,
                                       **settings.opening)
            try:
                check_device(kind, self._engine.generator)
            except DmoeError:
                self._engine.close()
                raise
        except DmoeError as error:
            raise pb_utils.TritonModelException(str(error)) from None
        self._requests, self._answers = metrics.of(name).requests, set[Future[None]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"answers-{name}", daemon=True)
        self._thread.start()
        generator = self._engine.generator
        pb_utils.Logger.log_info(f"dmoe-export: {name}: {settings.bundle} on {generator.backend.name} "
                                 f"({generator.backend_choice}), {count(self._engine.slots, 'answer')} at once")

    def execute(self, requests: list[Any]) -> None:
        """Read the requests and hand them on; answers come later, through their senders."""
        for request in requests:
            sender = Sender(request.get_response_sender(), request.request_id())
            try:
                wanted = wanted_of(self._engine.name, inputs_of(request), request.parameters(), request.request_id())
            except Exception as error:
                self._ended(sender.fail(error))
                continue
            answer = asyncio.run_coroutine_threadsafe(self._answer(wanted, sender), self._loop)
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)

    def is_ready(self) -> bool:
        """Whether requests can be answered: newer servers ask (2.51 does not)."""
        return self._engine.alive and not self._engine.worker.broken

    def finalize(self) -> None:
        """Let requests end, cancel the rest, and free the bundle."""
        self._engine.drain()
        wait(list(self._answers), self._settings.drain_seconds)
        self._engine.end_all()
        wait(list(self._answers), _LAST_SECONDS)
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _answer(self, wanted: Wanted, sender: Sender) -> None:
        try:
            ask = await wanted.ask(self._engine, self._settings.max_new_tokens, self._settings.timeout)
            answer = await self._engine.enter(ask, sender.gone)
            outcome = await sender.send(answer, wanted.stream, wanted.before)
        except Exception as error:
            outcome = sender.fail(error)
        self._ended(outcome)

    def _ended(self, outcome: str) -> None:
        self._requests.labels(self._engine.name, outcome).inc()


class _ToTriton(logging.Handler):
    """What the package logs is in the server's log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        log = pb_utils.Logger.log_error if record.levelno >= logging.ERROR else pb_utils.Logger.log_warn
        log(visible(f"dmoe-export: {record.getMessage()}"))


def _metrics(model: str, version: str, instance: str) -> Metrics:
    """Triton's, unless the server was started without."""
    try:
        return TritonMetrics(model, version, instance)
    except pb_utils.TritonModelException as error:
        pb_utils.Logger.log_warn(f"dmoe-export: there are no metrics of {instance}: {error}")
        return Metrics()
