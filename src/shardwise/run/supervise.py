"""The agent: starts the workers of one node, watches them, ends them, and starts them again.

It is torchelastic's SimpleElasticAgent (rendezvous, restarts) with our own handling of the
processes, because torchelastic's LocalElasticAgent asks the other workers of a failed group to end with SIGTERM and
waits for them up to 30 seconds; workers that treat SIGTERM as "save and stop" would start to save, without the rank
that failed. Here SIGTERM always means the user's wish, a failed group is ended with SIGKILL at once, and a group that
was asked to stop still delivers its results.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from typing import Any, final

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    SimpleElasticAgent,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.events import Event, EventSource  # type: ignore[attr-defined]

from shardwise.run.child import Child, start_child
from shardwise.run.failure import STALLED_EXIT, Failure, first_cause, from_exit_code, is_echo, stalled
from shardwise.run.process import Outcome, Setup, StartMethod
from shardwise.run.pulse import Pulse
from shardwise.run.rendezvous import FixedRendezvous
from shardwise.spec.rank import Rank

_POLL_SECONDS = 0.05
_SETTLE_SECONDS = 1.0
_LINGER_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers of one node: what they run, and how they are started and ended.

    Attributes:
        worker: the function of every rank.
        threads: torch's intra-operation threads in each worker.
        local_workers: workers on this node.
        environment: variables of every worker, besides those that name its rank.
        start_method: how their processes start.
        grace_seconds: how long they may take to save after a stop signal.
        lost_after_seconds: how long another node may give no sign of life.
        report: receives messages for people.
        signals: the stop signals the launcher has received so far; its signal handler appends to it.
    """

    worker: Callable[[Rank], Any]
    threads: int
    local_workers: int
    environment: dict[str, str]
    start_method: StartMethod
    grace_seconds: float
    lost_after_seconds: float
    report: Callable[[str], None]
    signals: list[int]


@final
class RankAgent(SimpleElasticAgent):
    """Runs a crew. Read `failure`, `stopped` and `result` (of the node's first rank, pickled) after `run()`."""

    def __init__(self, spec: WorkerSpec, rendezvous: FixedRendezvous, crew: Crew) -> None:
        super().__init__(spec)
        self.failure: Failure | None = None
        self.stopped: str | None = None
        self.result: bytes = b""
        self._rendezvous_handler = rendezvous
        self._crew = crew
        self._children: list[Child] = []
        self._pulse: Pulse | None = None
        self._forwarded = 0
        self._forwarded_at = 0.0

    def forget_store(self) -> None:
        """Drops the store now, not at some garbage collection.

        A process forked later inherits the garbage of this one; collecting a store there waits for a thread that does
        not exist there, and aborts.
        """
        self._store = None
        self._worker_group.store = None
        self._rendezvous_handler.shutdown()

    # What SimpleElasticAgent asks for ----------------------------------------------------------------------------

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._children = []
        self.failure = None
        here = self._rendezvous_handler
        address = (str(worker_group.master_addr), str(worker_group.master_port))
        for worker in worker_group.workers:
            rank = Rank(
                rank=worker.global_rank,
                local_rank=worker.local_rank,
                workers=worker.world_size,
                local_workers=self._crew.local_workers,
                node=here.node,
                nodes=here.nodes,
                restarts=here.round,
                launcher="local",
                endpoint=here.worker_endpoint(),
            )
            setup = Setup(
                worker=self._crew.worker,
                threads=self._crew.threads,
                environment={**self._crew.environment, **rank_environment(rank, address)},
                launcher_pid=os.getpid(),
                wants_result=rank.local_rank == 0,
            )
            self._children.append(start_child(self._crew.start_method, setup, rank))
        if here.nodes > 1:
            self._pulse = Pulse(
                here.round_store(self._crew.lost_after_seconds),
                node=here.node,
                nodes=here.nodes,
                workers_per_node=self._crew.local_workers,
                lost_after_seconds=self._crew.lost_after_seconds,
            )
        return {local_rank: child.pid for local_rank, child in enumerate(self._children)}

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._forward_signals()
        running = [child for child in self._children if child.alive]
        pipes = [child.pipe for child in running if child.outcome is None]
        wait([*(child.process.sentinel for child in running), *pipes], timeout=_POLL_SECONDS)
        failures = self._collect()
        elsewhere = self._pulse.verdict() if self._pulse else None
        if failures or elsewhere:
            self.failure = self._agree(failures, elsewhere)
            return self._failed(self.failure)
        if any(child.outcome is None for child in self._children):
            return RunResult(state=WorkerState.HEALTHY)
        ranks = [child.rank for child in self._children]
        if any(child.alive for child in self._children):
            self._end_lingering()
            return RunResult(state=WorkerState.HEALTHY)
        if self._pulse and not self._pulse.all_done():
            # A node that is lost now fails the whole group. torchelastic's barrier at the end would wait for it blindly, and
            # complain where node 0, which hosts the store, is through it first.
            time.sleep(_POLL_SECONDS / 5)
            return RunResult(state=WorkerState.HEALTHY)
        self._conclude()
        self._reap()
        return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(ranks, True))

    def _stop_workers(self, worker_group: WorkerGroup, *_versions: object) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGKILL, timeout: int = 0) -> None:
        for child in self._children:
            child.kill()
        self._reap()
        if self._pulse:
            self._pulse.end()
            self._pulse = None

    def _exit_barrier(self) -> None:
        """Nothing: all nodes have said that their workers are done, see _monitor_workers."""

    def _construct_event(self, state: str, source: EventSource, *_details: object, **_more: object) -> Event:
        # torchelastic's own asks DNS for this machine's full name, for every event of every worker, which takes seconds
        # each where DNS does not answer. Nobody listens to these events.
        return Event(name=f"torchelastic.worker.status.{state}", source=source)

    # Details -----------------------------------------------------------------------------------------------------

    def _collect(self) -> list[Failure]:
        """Reads what has arrived; returns the failures known so far, in the order of being noticed."""
        failures = []
        for child in self._children:
            if child.outcome is None:
                alive = child.alive  # asked before the pipe is read: what a worker sent before it ended is in the pipe
                child.outcome = self._receive(child, alive)
                child.done_at = time.monotonic()
            if child.outcome is not None and child.outcome.failure is not None:
                failures.append(child.outcome.failure)
        return failures

    def _receive(self, child: Child, alive: bool) -> Outcome | None:
        try:
            if child.pipe.poll():
                outcome = child.pipe.recv()
                assert isinstance(outcome, Outcome)
                return outcome
        except (EOFError, OSError, pickle.UnpicklingError):
            alive = False  # the pipe closes only with the process
        if alive:
            return None
        exit_code = child.exit_code()
        if self._forwarded and exit_code == STALLED_EXIT:
            return Outcome(failure=stalled(child.rank))
        # 1 is Python's own exit after a KeyboardInterrupt that hit outside the worker function.
        if self._forwarded and (exit_code == 1 or -exit_code in self._crew.signals):
            return Outcome(stopped="the workers ended on the signal before they could save anything")
        return Outcome(failure=from_exit_code(exit_code, child.rank))

    def _agree(self, failures: list[Failure], elsewhere: Failure | None) -> Failure:
        """Waits for the cause where only its echo has been seen, and settles on one failure with the other nodes."""
        patience = _SETTLE_SECONDS + (self._crew.lost_after_seconds if self._pulse else 0)
        deadline = time.monotonic() + patience
        while elsewhere is None and is_echo(first_cause(failures)) and time.monotonic() < deadline:
            if not any(child.outcome is None for child in self._children) and not self._pulse:
                break
            time.sleep(_POLL_SECONDS / 5)
            failures = self._collect()
            elsewhere = self._pulse.verdict() if self._pulse else None
        if elsewhere is not None:
            return elsewhere
        cause = first_cause(failures)
        if cause.kind in ("timeout", "killed", "exit"):
            cause = replace(cause, details=cause.details.rstrip() + self._where_others_are())
        return self._pulse.publish(cause) if self._pulse else cause

    def _where_others_are(self) -> str:
        """Of a hang, the rank that timed out is the victim; the ranks that did not come to it are the cause. Of a rank that ended
        without a word, the step that the others were in says what it was doing."""
        text = ""
        for child in self._children:
            if child.outcome is None and (stack := child.stack()):
                text += f"\n\nMeanwhile rank {child.rank} was here (innermost call first):\n{stack}"
        return text

    def _failed(self, failure: Failure) -> RunResult:
        if not failure.restartable or self._crew.signals:
            self._remaining_restarts = 0
        elif self._remaining_restarts > 0:
            total = self._worker_group.spec.max_restarts
            number = total - self._remaining_restarts + 1
            self._crew.report(f"{failure.sentence()} Restarting all workers (restart {number} of {total}).")
        return RunResult(state=WorkerState.FAILED)

    def _forward_signals(self) -> None:
        if len(self._crew.signals) > self._forwarded:
            self._forwarded = len(self._crew.signals)
            number = self._crew.signals[-1]
            name = signal.Signals(number).name
            if self._forwarded > 1:
                self._crew.report(f"{name} again: ending the workers now.")
                self._give_up(f"were ended by a second {name} before they had saved")
                return
            self._forwarded_at = time.monotonic()
            grace = f"{self._crew.grace_seconds:g} s"
            self._crew.report(f"{name}: the workers have {grace} to save and stop. Send it again to end them now.")
            for child in self._children:
                if child.outcome is None:
                    child.send(number)
        elif self._forwarded and time.monotonic() - self._forwarded_at > self._crew.grace_seconds:
            self._give_up(f"did not stop within {self._crew.grace_seconds:g} s and were ended")

    def _give_up(self, why: str) -> None:
        waiting = [child.rank for child in self._children if child.outcome is None]
        names = "rank " + str(waiting[0]) if len(waiting) == 1 else "ranks " + ", ".join(map(str, waiting))
        for child in self._children:
            child.kill()
            if child.outcome is None:
                failure = Failure(
                    rank=child.rank,
                    kind="grace",
                    summary=why,
                    error_class="RunFailed",
                    message=f"{names} {why}. The last complete checkpoint is what `--resume` continues from.",
                )
                child.outcome = Outcome(failure=failure)

    def _end_lingering(self) -> None:
        for child in self._children:
            if child.alive and time.monotonic() - child.done_at > _LINGER_SECONDS:
                self._crew.report(
                    f"rank {child.rank} returned but its process did not end (a thread still runs): ended it."
                )
                child.kill()

    def _reap(self) -> None:
        for child in self._children:
            child.close()
        self._children = []

    def _conclude(self) -> None:
        outcomes = [child.outcome for child in self._children if child.outcome is not None]
        self.result = outcomes[0].result or b""
        self.stopped = next((o.stopped for o in outcomes if o.stopped is not None), None)


def rank_environment(rank: Rank, address: tuple[str, str]) -> dict[str, str]:
    """torchrun's variables for this rank, for libraries that look for them. shardwise itself reads the Rank."""
    host, port = address
    return {
        "RANK": str(rank.rank),
        "LOCAL_RANK": str(rank.local_rank),
        "WORLD_SIZE": str(rank.workers),
        "LOCAL_WORLD_SIZE": str(rank.local_workers),
        "GROUP_RANK": str(rank.node),
        "GROUP_WORLD_SIZE": str(rank.nodes),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(rank.restarts),
        # On one node nobody listens at the port: a library that makes a group of its own hosts its store there.
        "TORCHELASTIC_USE_AGENT_STORE": str(rank.nodes > 1),
    }
