"""Serve's router for replicas with a prefix store: to the one that had the prompt's beginning, else by Serve's rule."""

from __future__ import annotations

import random
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..asked import Ask
from .prefix import Affinity, beginnings


class PrefixRouter(RequestRouter):
    """Ranks the replica of `Affinity` first, then two by chance, of which Serve takes the one with the shorter queue.

    Serve's interface is alpha: this is written for 2.60.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """Called once by Serve."""
        self._affinity = Affinity(**kwargs)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve whenever some have begun or ended."""
        super().update_replicas(replicas)
        self._affinity.only({one.replica_id for one in replicas})

    async def choose_replicas(self, candidate_replicas: list[RunningReplica],
                              pending_request: PendingRequest | None = None) -> list[list[RunningReplica]]:
        """Ranks, the best first; Serve asks again where all of them are full."""
        if not candidate_replicas:
            return []
        two = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        by_id = {one.replica_id: one for one in candidate_replicas}
        best = self._affinity.choose(_marks(pending_request), self._length, by_id)
        if pending_request:
            pending_request.routing_context.should_backoff = True
        return [two] if best is None else [[by_id[best]], two]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Called by Serve once a replica has taken a request."""
        self._affinity.had(_marks(pending_request), replica_id)

    def _length(self, replica: ReplicaID) -> int:
        """Of a replica's queue, as far as it is known here."""
        return self.replica_queue_len_cache.get(replica) or 0


def _marks(request: PendingRequest | None) -> list[bytes]:
    """Of the first prompt; other calls than a request for an answer have none."""
    ask = request.args[0] if request and request.args else None
    return beginnings(ask.prompts[0], ask.chat) if isinstance(ask, Ask) and ask.prompts else []
