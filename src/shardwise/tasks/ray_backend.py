"""Tasks on a Ray cluster: each worker is an actor, which lives on whatever node has room for it.

The engine decides what runs next and how often, as on one machine; Ray finds the place, starts the process and carries the
data. shardwise must be installed on the nodes.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, final

import numpy as np

from shardwise.errors import UserError
from shardwise.tasks import worker as local_worker
from shardwise.tasks.backend import Backend, Death, Event, Order, Reply, Worker
from shardwise.tasks.need import Allocation, Capacity
from shardwise.tasks.wire import Payload, SharedFile, places

POLL_SECONDS = 0.1
"""Longest wait for Ray in one go: nothing can interrupt it."""

Carried = tuple[bytes, list[Any]]
"""A payload as Ray carries it: a pickle, and its large buffers as arrays, which Ray keeps in its shared memory."""


def to_carry(payload: Payload) -> Carried:
    if payload.file is None:
        return payload.data, []
    view = payload.file.map()
    starts, _ = places(payload.sizes)
    return payload.data, [
        np.frombuffer(view[start : start + size], np.uint8) for start, size in zip(starts, payload.sizes, strict=True)
    ]


def from_carry(carried: Carried) -> Payload:
    data, buffers = carried
    if not buffers:
        return Payload(data)
    file = SharedFile.of([memoryview(buffer).cast("B") for buffer in buffers])
    return Payload(data, tuple(buffer.nbytes for buffer in buffers), file)


class RayActor:
    """Lives in a process of its own; runs one task at a time."""

    def __init__(self, threads: int) -> None:
        local_worker.set_threads(threads)
        self._bench = local_worker.Bench()

    def born(self) -> None:
        """Answered once the process has started."""

    def run(
        self, number: int, function_number: int, function: Carried, arguments: Carried, inputs: Any, limit: Any
    ) -> Any:
        """What the task told: the fields of a `Reply` after the worker and number."""
        (told, seconds, peak, remarks), payload = self._bench.run(
            function_number,
            from_carry(function),
            from_carry(arguments),
            {index: from_carry(one) for index, one in inputs},
            limit,
            end_children=False,  # Ray's own helpers may be among them
        )
        return told, seconds, peak, remarks, to_carry(payload) if payload is not None else None


@final
class RayWorker(Worker):
    """An actor and what was sent to it."""

    def __init__(self, ray: Any, actor: Any, kind: tuple[int, float, int]) -> None:
        self._ray = ray
        self.actor = actor
        self.kind = kind
        self.alive = True
        self.killed = False
        self.sent: deque[tuple[int, Any]] = deque()
        self.birth: Any = actor.born.remote()
        self._functions: dict[int, Any] = {}
        self._began = time.monotonic()

    def send(self, orders: Sequence[Order]) -> bool:
        if not self.alive:
            return False
        for order in orders:
            function = self._functions.get(order.function_number)
            if function is None:
                function = self._functions[order.function_number] = self._ray.put(to_carry(order.function))
            inputs = [(number, to_carry(payload)) for number, payload in order.inputs]
            if not self.sent:
                self._began = time.monotonic()
            reference = self.actor.run.remote(
                order.number, order.function_number, function, to_carry(order.arguments), inputs, order.memory_bytes
            )
            self.sent.append((order.number, reference))
        return True

    def ended(self) -> None:
        """The first of the sent tasks has ended, and the next one has begun."""
        self.sent.popleft()
        self._began = time.monotonic()

    def is_born(self) -> None:
        """Its process has started: not before does the first task use up its time."""
        self.birth = None
        self._began = time.monotonic()

    def recall(self) -> list[int]:
        return []  # a call that an actor has been given cannot be taken back for certain

    def current(self) -> tuple[int, float] | None:
        return (self.sent[0][0], self._began) if self.sent and self.alive and self.birth is None else None

    def where(self) -> str:
        return ""

    def kill(self) -> None:
        if self.alive and not self.killed:
            self.killed = True
            if self._ray.is_initialized():  # else its actors have ended with it, and `kill` would start another Ray
                self._ray.kill(self.actor)

    def resident_bytes(self) -> int:
        return 0


@final
class RayBackend(Backend):
    """Actors on a cluster, or on a local Ray that ends with the backend."""

    def __init__(self, address: str, *, workers: int | None, tokens: dict[str, int]) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(f"on={address!r} needs Ray: pip install 'shardwise[ray]'") from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            try:
                if address == "ray":
                    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
                else:
                    ray.init(address, log_to_driver=False, logging_level="error")
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"no Ray cluster answers at {address}: {error}") from error
        found = ray.cluster_resources()
        cores = float(found.get("CPU", 0.0)) if workers is None else min(float(workers), float(found.get("CPU", 0.0)))
        devices = tuple(f"gpu{number}" for number in range(int(found.get("GPU", 0))))
        self._capacity = Capacity(cores, devices, int(found.get("memory", 1 << 62)), tokens)
        self._actor = ray.remote(RayActor)
        self._workers: list[RayWorker] = []
        self._idle: list[RayWorker] = []
        self._woken = threading.Event()

    @property
    def capacity(self) -> Capacity:
        return self._capacity

    def open(self, allocation: Allocation) -> Worker:
        need = allocation.need
        kind = (need.threads, need.cores, round(1000 * need.gpus))
        for worker in self._idle:
            if worker.kind == kind:
                self._idle.remove(worker)
                return worker
        for worker in self._idle:  # they hold what the new one needs
            self._forget(worker)
        self._idle.clear()
        options: dict[str, Any] = {"num_cpus": need.cores, "num_gpus": need.gpus, "max_restarts": 0}
        worker = RayWorker(self._ray, self._actor.options(**options).remote(need.threads), kind)
        self._workers.append(worker)
        return worker

    def release(self, worker: Worker) -> None:
        assert isinstance(worker, RayWorker)
        if worker.alive:
            self._idle.append(worker)

    def wait(self, timeout_seconds: float | None) -> list[Event]:
        deadline = time.monotonic() + timeout_seconds if timeout_seconds is not None else None
        while True:
            owners = {reference: worker for worker in self._workers for _, reference in worker.sent}
            if not owners:
                return []
            owners.update({worker.birth: worker for worker in self._workers if worker.birth is not None})
            left = POLL_SECONDS if deadline is None else min(POLL_SECONDS, max(0.0, deadline - time.monotonic()))
            ready, _ = self._ray.wait(list(owners), num_returns=len(owners), timeout=0)
            if not ready:
                ready, _ = self._ray.wait(list(owners), num_returns=1, timeout=left)
            if events := self._events({id(owners[one]): owners[one] for one in ready}, set(ready)):
                return events
            if self._woken.is_set() or (deadline is not None and time.monotonic() >= deadline):
                self._woken.clear()
                return []

    def _events(self, workers: dict[int, RayWorker], ready: set[Any]) -> list[Event]:
        events: list[Event] = []
        for worker in workers.values():
            if worker.birth in ready:
                worker.is_born()  # or it died: its first task tells
            while worker.sent and worker.sent[0][1] in ready and worker.alive:
                number, reference = worker.sent[0]
                try:
                    told, seconds, peak, remarks, carried = self._ray.get(reference)
                except self._ray.exceptions.RayError as error:
                    events.append(self._died(worker, number, error))
                    break
                worker.ended()
                payload = from_carry(carried) if carried is not None else None
                events.append(Reply(worker, number, told, seconds, peak, remarks, payload))
        return events

    def _died(self, worker: RayWorker, number: int, error: Exception) -> Death:
        began = worker.current()
        seconds = time.monotonic() - began[1] if began is not None else 0.0
        self._forget(worker)
        memory = isinstance(error, self._ray.exceptions.OutOfMemoryError)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return Death(
            worker,
            number,
            None,
            None,
            out_of_memory=memory,
            seconds=seconds,
            message=lines[0] if lines else repr(error),
        )

    def wake(self) -> None:
        self._woken.set()  # seen when the wait for Ray that goes on has ended

    def _forget(self, worker: RayWorker) -> None:
        worker.kill()
        worker.alive = False
        worker.sent.clear()
        if worker in self._workers:
            self._workers.remove(worker)

    def close(self) -> None:
        for worker in list(self._workers):
            self._forget(worker)
        if self._started and self._ray.is_initialized():
            self._ray.shutdown()
        self._started = False
