"""Signs of life between the launchers of several nodes, and what they agree on: one failure, or the end.

All store traffic happens in a thread of its own, over a connection of its own, because a store whose machine has lost
its power does not answer, and the launcher must notice that rather than wait for it. Node 0 hosts the store and listens
to everybody; the other nodes listen to node 0, so that the traffic grows with the nodes and not with their square.
"""

from __future__ import annotations

import threading
import time
from typing import final

from torch.distributed import DistError, Store  # type: ignore[attr-defined]

from shardwise.run.failure import Failure

_BEAT_SECONDS = 0.5
_HURRY_SECONDS = 0.05
_FAREWELL_SECONDS = 5.0


@final
class Pulse:
    """One round's signs of life; ends with `end()`.

    Args:
        store: keys of this round only, where every node has set `here/<its number>`; nobody else may use this
            connection, because a call that waits would stop the signs of life.
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
        self._proposed: Failure | None = None
        self._agreed: Failure | None = None
        self._heard = False  # what was agreed or that all is done: this node has said that it knows; node 0: all have
        self._done = False
        self._all_done = False
        now = time.monotonic()
        self._beats = dict.fromkeys(self._watched, (b"", now))
        self._answered_at = now
        self._ended = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._beat_forever, name="shardwise pulse", daemon=True)
        self._thread.start()

    def verdict(self) -> Failure | None:
        """The failure the nodes have agreed on, or the silence of a node this one watches; None while all is well."""
        if self._agreed is not None or self._all_done:
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

    def all_done(self) -> bool:
        """Says that this node's workers have finished; returns whether those of all nodes have. Does not wait."""
        if not self._done:
            self._done = True
            self._wake.set()
        return self._all_done

    def end(self) -> None:
        """Ends the signs of life. Node 0, which takes the store along, first lets the others hear what was agreed."""
        deadline = time.monotonic() + min(_FAREWELL_SECONDS, self._lost_after_seconds)
        settled = self._agreed is not None or self._all_done
        while settled and self._node == 0 and not self._heard and time.monotonic() < deadline:
            time.sleep(0.01)
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
        while not self._ended.is_set() and not self._heard:  # once all is said, node 0 takes the store away
            count += 1
            hurry = self._done or self._proposed is not None or self._agreed is not None
            try:
                self._beat(count)
                self._talk()
                self._answered_at = time.monotonic()
            except (DistError, RuntimeError):
                # The store is gone or slow: `verdict` decides by the time of the last answer.
                hurry = False
            self._wake.wait(_HURRY_SECONDS if hurry else _BEAT_SECONDS)
            self._wake.clear()

    def _beat(self, count: int) -> None:
        self._store.set(f"here/{self._node}", str(count))
        now = time.monotonic()
        beats = self._store.multi_get([f"here/{other}" for other in self._watched])
        for other, beat in zip(self._watched, beats, strict=True):
            if beat != self._beats[other][0]:
                self._beats[other] = (beat, now)

    def _talk(self) -> None:
        if self._agreed is None:
            if self._proposed is not None:
                agreed = self._store.compare_set("failure", "", self._proposed.to_json())
                self._agreed = Failure.from_json(agreed.decode())
            elif self._store.check(["failure"]):
                self._agreed = Failure.from_json(self._store.get("failure").decode())
        if self._agreed is None and self._done:
            self._store.set(f"done/{self._node}", "1")
            if self._node == 0 and self._store.check([f"done/{other}" for other in self._watched]):
                self._store.set("all_done", "1")
            self._all_done = self._store.check(["all_done"])
        if self._agreed is not None or self._all_done:
            self._store.set(f"heard/{self._node}", "1")
            self._heard = self._node != 0 or self._store.check([f"heard/{other}" for other in self._watched])
