"""Where the nodes of a run meet: a torchelastic rendezvous with a fixed number of nodes and fixed node numbers.

torchelastic's own two do not fit. `static` keeps one store, without a prefix, over all restarts, so that a restarted
group finds the addresses of the group that died. `c10d` numbers the nodes as they come, while `--node-rank` promises
the number, and it is several times slower to start. Here every round has its own keys (one node: its own store), and the
store lives outside the launcher, for the reasons in run/store.py.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import final

import torch
from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from shardwise.errors import UserError
from shardwise.run.network import LOOPBACK, free_port
from shardwise.run.process import StartMethod
from shardwise.run.store import StoreFile, StoreServer

_SLICE_SECONDS = 0.5
_QUIET_SECONDS = 5.0
_PART_SECONDS = 5.0


def _installed() -> str:
    try:
        return version("shardwise")
    except PackageNotFoundError:  # imported from a folder
        return "not installed"


@final
class FixedRendezvous(RendezvousHandler):
    """Brings the launchers of `nodes` nodes together, again for every restart.

    Args:
        node: number of this node; node 0 hosts the store at `endpoint`.
        nodes: how many nodes there are.
        endpoint: (host, port) of the store; not used for one node.
        run_id: name of the run; launchers of different runs never meet, even at the same endpoint.
        join_seconds: how long to wait for the others.
        workers: on this node; every node starts as many.
        method: how the workers start.
        cancelled: asked twice a second; True ends the waiting.
        report: is told whom a long wait is for.
    """

    def __init__(
        self,
        *,
        node: int,
        nodes: int,
        endpoint: tuple[str, int],
        run_id: str,
        join_seconds: float,
        workers: int,
        method: StartMethod,
        cancelled: Callable[[], bool],
        report: Callable[[str], None],
    ) -> None:
        self.node = node
        self.nodes = nodes
        self.endpoint = endpoint
        self.run_id = run_id
        self.round = -1
        self._join_seconds = join_seconds
        self._method: StartMethod = method
        self._cancelled = cancelled
        self._report = report
        self._claim = {
            "--nnodes": nodes,
            "workers a node": workers,
            "torch": torch.__version__.partition("+")[0],
            "shardwise": _installed(),
        }
        self._server: StoreServer | None = None
        self._store: TCPStore | None = None
        self._file: StoreFile | None = None
        self._closed = False

    def next_rendezvous(self) -> RendezvousInfo:
        if self.nodes == 1:
            # A fresh file for every round: nothing of a group that died can reach the next one.
            self.round += 1
            if self._file is not None:
                self._file.close()
            self._file = StoreFile(self._method)
            return self._info(HashStore(), LOOPBACK, free_port())
        host, port = self.endpoint
        if self._store is None:
            self._store = self._connect(host, port)
        store = PrefixStore(f"shardwise/{self.run_id}", self._store)
        try:
            self.round = self._next_round(store)
            self._join(PrefixStore(f"round/{self.round}", store))
        except DistError as error:
            raise RendezvousConnectionError(
                f"node 0, which hosts the store at {host}:{port}, ended while this node waited for the others; its own "
                "output says why"
            ) from error
        return self._info(PrefixStore(f"round/{self.round}", store), host, port)

    def round_store(self, timeout_seconds: float) -> Store:
        """The keys of the present round over a connection of their own (several nodes only)."""
        host, port = self.endpoint
        timeout = timedelta(seconds=timeout_seconds)
        client = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
        return PrefixStore(f"round/{self.round}", PrefixStore(f"shardwise/{self.run_id}", client))

    def worker_endpoint(self) -> str:
        """Where the workers of the present round find each other, as Rank.endpoint says it."""
        if self._file is not None:
            return self._file.path
        host, port = self.endpoint
        return f"{host}:{port}"

    def _info(self, store: Store, host: str, port: int) -> RendezvousInfo:
        return RendezvousInfo(store, self.node, self.nodes, RendezvousStoreInfo(host, port))

    def _connect(self, host: str, port: int) -> TCPStore:
        wait = self._wait("node 0 to answer")
        while True:
            self._check_cancelled()
            try:
                if self.node == 0 and self._server is None:
                    self._server = StoreServer(host, port)
                with socket.create_connection((host, port), timeout=_SLICE_SECONDS):
                    pass
                return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
            except (DistError, OSError) as error:
                if self.node == 0:
                    raise RendezvousConnectionError(
                        f"node 0 cannot host the store at {host}:{port}: {error}"
                    ) from error
                if wait():
                    raise RendezvousTimeoutError(
                        f"nobody answers at the rendezvous endpoint {host}:{port} within {self._join_seconds:g} s. "
                        "Node 0 must run with the same --rdzv-endpoint, and this machine must be able to reach it."
                    ) from error
                time.sleep(0.05)

    def _next_round(self, store: Store) -> int:
        """The round to join: the one after ours, or, for a node that comes (back) late, the one the others wait in."""
        while True:
            newest = int(store.compare_set("newest_round", "", "0"))
            wanted = max(self.round + 1, newest)
            if self.round < 0 and store.check([f"round/{newest}/full"]):
                wanted = newest + 1  # the others run without us: they will notice that we died, and come to the next
            if wanted == newest or int(store.compare_set("newest_round", str(newest), str(wanted))) >= wanted:
                return wanted

    def _join(self, store: Store) -> None:
        store.set(f"claim/{self.node}", json.dumps(self._claim))
        store.set(f"here/{self.node}", "1")
        missing = [*range(self.nodes)]
        wait = None
        while True:
            came = [node for node in missing if store.check([f"here/{node}"])]
            missing = [node for node in missing if node not in came]
            for node in came:
                self._check_alike(store, node, missing)
            if not missing:
                store.set("full", "1")
                return
            names = ", ".join(f"node {node}" for node in missing)
            wait = wait or self._wait(f"{names} to come")
            self._check_cancelled()
            if wait():
                raise RendezvousTimeoutError(
                    f"{names} of {self.nodes} nodes did not come within {self._join_seconds:g} s. Start the same "
                    "command on every node, with its own --node-rank and the same --rdzv-endpoint and --rdzv-id."
                )
            time.sleep(0.02)

    def _check_alike(self, store: Store, node: int, missing: list[int]) -> None:
        """Each node must have been started for the same number of nodes and workers, as each numbers the workers by itself."""
        theirs = json.loads(store.get(f"claim/{node}"))
        for what, ours in self._claim.items():
            if theirs[what] != ours:
                self._part(store, missing)
                raise UserError(
                    f"{what} is {ours} on node {self.node} and {theirs[what]} on node {node}. Start all nodes with the same "
                    "packages, --nnodes, and --plan or --workers: where a plan is left out, each goes by its own cores."
                )

    def _part(self, store: Store, missing: list[int]) -> None:
        """Node 0 takes the store along, so it leaves when the others that came have seen what it saw."""
        store.set(f"parted/{self.node}", "1")
        others = [f"parted/{node}" for node in range(self.nodes) if node not in missing]
        deadline = time.monotonic() + _PART_SECONDS
        while self.node == 0 and not store.check(others) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _wait(self, whom: str) -> Callable[[], bool]:
        """A question that is asked again and again while waiting: is the time over? Says once whom it waits for."""
        began = time.monotonic()
        told = False

        def over() -> bool:
            nonlocal told
            waited = time.monotonic() - began
            if waited > _QUIET_SECONDS and not told:
                told = True
                host, port = self.endpoint
                self._report(f"waiting for {whom} at {host}:{port}, up to {self._join_seconds:g} s")
            return waited > self._join_seconds

        return over

    def _check_cancelled(self) -> None:
        if self._cancelled():
            raise RendezvousGracefulExitError("stopped while waiting for the other nodes")

    @property
    def use_agent_store(self) -> bool:
        return True

    def get_backend(self) -> str:
        return "shardwise"

    def get_run_id(self) -> str:
        return self.run_id

    def num_nodes_waiting(self) -> int:
        return 0

    def is_closed(self) -> bool:
        return self._closed

    def set_closed(self) -> None:
        self._closed = True

    def shutdown(self) -> bool:
        self._closed = True
        self._store = None
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._file is not None:
            self._file.close()
            self._file = None
        return True
