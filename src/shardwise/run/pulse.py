"""Signs of life between the launchers of several nodes, and the one failure they agree on.

All store traffic happens in a thread of its own, because a store whose machine has lost its power does not answer, and
the launcher must notice that rather than wait for it. Node 0 hosts the store and listens to everybody; the other nodes
listen to node 0, so that the traffic grows with the nodes and not with their square.
"""

from __future__ import annotations

import threading
import time
from typing import final

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from shardwise.run.failure import Failure

_BEAT_SECONDS = 0.5


@final
class Pulse:
    """One round's signs of life; ends with `end()`.

    Args:
        store: keys of this round only.
        node: number of this node.
        nodes: number of nodes.
        workers_per_node: to name the first rank of a lost node.
        lost_after_seconds: a node that is silent for so long counts as dead.
    """

    def __init__(
        self, store: Store, *, node: int, nodes: int, workers_per_node: int, lost_after_seconds: float
    ) -> None:
        self._store = store
        self._node = node
        self._watched = [other for other in range(nodes) if other != node] if node == 0 else [0]
        self._workers_per_node = workers_per_node
        self._lost_after_seconds = lost_after_seconds
        self._agreed: Failure | None = None
        self._proposed: Failure | None = None
        now = time.monotonic()
        self._beats = dict.fromkeys(self._watched, (b"", now))
        self._answered_at = now
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="shardwise pulse", daemon=True)
        self._thread.start()

    def verdict(self) -> Failure | None:
        """The failure the nodes have agreed on, or the silence of a node this one watches; None while all is well."""
        if self._agreed is not None:
            return self._agreed
        now = time.monotonic()
        if now - self._answered_at > self._lost_after_seconds and self._node != 0:
            return self._lost(0)  # the store is silent, and node 0 hosts it
        for other, (_, seen_at) in self._beats.items():
            if now - seen_at > self._lost_after_seconds:
                return self.publish(self._lost(other))
        return None

    def publish(self, failure: Failure) -> Failure:
        """Tells the other nodes; returns the failure that all of them settle on, which may be an earlier one."""
        self._proposed = failure
        self._wake.set()
        deadline = time.monotonic() + self._lost_after_seconds
        while self._agreed is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self._agreed or failure

    def end(self) -> None:
        self._ended.set()
        self._wake.set()
        self._thread.join(_BEAT_SECONDS)  # longer only where the store's machine does not answer

    def _lost(self, node: int) -> Failure:
        what = f"node {node} gave no sign of life for {self._lost_after_seconds:g} s"
        if node == 0:
            what += ", and it hosts the store of the run"
        hint = "Its machine, its launcher or the network between the nodes is down."
        return Failure(rank=node * self._workers_per_node, kind="lost", summary=f"{what}. {hint}")

    def _beat_forever(self) -> None:
        count = 0
        while not self._ended.is_set():
            count += 1
            try:
                self._beat(count)
                self._answered_at = time.monotonic()
            except (DistError, RuntimeError):
                # The store is gone or slow: `verdict` decides by the time of the last answer.
                self._ended.wait(_BEAT_SECONDS)
            self._wake.wait(_BEAT_SECONDS)
            self._wake.clear()

    def _beat(self, count: int) -> None:
        self._store.set(f"beat/{self._node}", str(count))
        if self._proposed is not None:
            self._agreed = Failure.from_json(self._store.compare_set("failure", "", self._proposed.to_json()).decode())
        elif self._store.check(["failure"]):
            self._agreed = Failure.from_json(self._store.get("failure").decode())
        now = time.monotonic()
        for other in self._watched:
            key = f"beat/{other}"
            if self._store.check([key]):
                beat = self._store.get(key)
                if beat != self._beats[other][0]:
                    self._beats[other] = (beat, now)
