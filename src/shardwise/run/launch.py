"""launch: from one process to all ranks, and back to one result.

Three ways lead into the worker function:
- inline: one worker on one node runs in the calling process; no child, no process group;
- local: the workers of this node are processes under `RankAgent`, one launcher per node;
- torchrun (or whatever sets its variables): the calling process already is a rank and runs the function itself.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.elastic.rendezvous import RendezvousError, RendezvousGracefulExitError

from shardwise import errors
from shardwise.run import network
from shardwise.run.heap import give_freed_memory_back, use_one_heap
from shardwise.run.process import StartMethod, default_start_method, set_threads
from shardwise.run.progress import tell
from shardwise.run.rendezvous import FixedRendezvous
from shardwise.run.signals import STOP_SIGNALS, handling
from shardwise.run.supervise import Crew, RankAgent
from shardwise.spec.rank import SERIAL, Rank

T = TypeVar("T")

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The machines of a run, in torchrun's terms; one launcher runs on each.

    Attributes:
        count: number of nodes (`--nnodes`).
        node_rank: number of this node (`--node-rank`); node 0 hosts the store.
        endpoint: HOST:PORT of node 0, reachable from all nodes (`--rdzv-endpoint`).
        run_id: name of the run, the same on all nodes (`--rdzv-id`).
        join_seconds: how long to wait for the other nodes, at the start and at each restart.
        lost_after_seconds: a node without a sign of life for so long counts as dead.
    """

    count: int = 1
    node_rank: int = 0
    endpoint: str | None = None
    run_id: str = "shardwise"
    join_seconds: float = 300.0
    lost_after_seconds: float = 15.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise errors.UserError(f"--nnodes is {self.count}; a run has at least one node.")
        if not 0 <= self.node_rank < self.count:
            raise errors.UserError(
                f"--node-rank is {self.node_rank} of {self.count} nodes; nodes are numbered from 0 to {self.count - 1}."
            )
        if self.count > 1 and self.endpoint is None:
            raise errors.UserError(
                f"{self.count} nodes need a place to meet: give each the same --rdzv-endpoint, HOST:PORT of node 0."
            )
        if self.endpoint is not None:
            network.split_endpoint(self.endpoint)

    def address(self) -> tuple[str, int]:
        """(host, port) of the store; the loopback address and any port where there is one node."""
        if self.count == 1 or self.endpoint is None:
            return network.LOOPBACK, 0
        return network.split_endpoint(self.endpoint)


def print_report(text: str) -> None:
    """Where the launcher's own messages go by default: standard error."""
    tell(text)


def launch(
    worker: Callable[[Rank], T],
    *,
    workers: int,
    threads: int,
    device: str = "cpu",
    nodes: Nodes | None = None,
    max_restarts: int = 0,
    report: Callable[[str], None] = print_report,
    grace_seconds: float = 60.0,
    start_method: StartMethod | None = None,
    signals: list[int] | None = None,
) -> T:
    """Runs worker(rank) on every rank and returns the result of rank 0 (on other nodes: of their first rank).

    Args:
        worker: the function of every rank. It is sent to spawned workers (any device but the CPU), with its code where that is
            in no module; forked ones inherit it as it is. Its result must be picklable unless it runs inline.
        workers: workers over all nodes; every node gets the same number.
        threads: torch's intra-operation threads in each worker.
        device: device type ("cpu", "cuda", ...).
        nodes: the machines; None is this one.
        max_restarts: how often all workers are started again, with Rank.restarts counting, after one of them fails.
        report: receives the launcher's messages; a failed rank's traceback is one of them, and comes first.
        grace_seconds: how long workers may take to save after SIGINT or SIGTERM; a second signal ends them at once.
        signals: receives the numbers of the stop signals that came meanwhile, for a caller to whom these matter more than how
            the workers ended.
        start_method: "fork" or "spawn"; None picks fork for CPU workers on Linux.

    Raises:
        UserError: the numbers do not fit together, or a worker raised a UserError (its class and message are kept).
        Stopped: a signal asked the run to stop, and the workers did.
        RunFailed: a rank failed for good; `rank` and `details` (its traceback) say which and how.
    """
    nodes = nodes or Nodes()
    _check(workers, threads, nodes, max_restarts)
    outer = current_rank()
    if outer is not None:
        return _run_as_rank(worker, outer, workers, threads, nodes, max_restarts, report)
    if workers == 1 and nodes.count == 1 and max_restarts == 0:
        return _run_inline(worker, SERIAL, threads)
    method = start_method or default_start_method(device)
    crew = Crew(
        worker=worker,
        threads=threads,
        local_workers=workers // nodes.count,
        environment=_crew_environment(threads, nodes.address()[0]),
        start_method=method,
        grace_seconds=grace_seconds,
        lost_after_seconds=nodes.lost_after_seconds,
        report=report,
        signals=signals if signals is not None else [],
    )
    agent = _agent(crew, nodes, max_restarts)
    _run_agent(agent, crew.signals)
    result: T = _result(agent, report)
    return result


def current_rank(environment: Mapping[str, str] = os.environ) -> Rank | None:
    """The rank this process already is because torchrun (or anything that sets its variables) started it; else None.

    Raises:
        UserError: RANK and WORLD_SIZE are set, but not all the variables that go with them.
    """
    if _LOCAL_MARK in environment or "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in _RANK_VARIABLES if not environment.get(name)]
    if missing:
        raise errors.UserError(
            f"RANK and WORLD_SIZE are set in the environment, but not {', '.join(missing)}. A process that is a rank "
            f"needs all of {', '.join(_RANK_VARIABLES)} (torchrun sets them); unset RANK and WORLD_SIZE if it is none."
        )
    numbers = {name: _integer(environment, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    workers = numbers["WORLD_SIZE"]
    local_workers = _integer(environment, "LOCAL_WORLD_SIZE", default=workers)
    if not (0 <= numbers["RANK"] < workers and 0 <= numbers["LOCAL_RANK"] < local_workers <= workers):
        raise errors.UserError(
            f"RANK={numbers['RANK']}, WORLD_SIZE={workers}, LOCAL_RANK={numbers['LOCAL_RANK']}, LOCAL_WORLD_SIZE="
            f"{local_workers} in the environment contradict each other: ranks are numbered from 0 to WORLD_SIZE - 1."
        )
    return Rank(
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        workers=workers,
        local_workers=local_workers,
        node=_integer(environment, "GROUP_RANK", default=numbers["RANK"] // local_workers),
        nodes=_integer(environment, "GROUP_WORLD_SIZE", default=-(-workers // local_workers)),
        restarts=_integer(environment, "TORCHELASTIC_RESTART_COUNT", default=0),
        launcher="torchrun",
    )


# Set in our own workers, which carry torchrun's variables for other libraries: a launch() inside one (by a pool worker
# that trains something of its own) is a launch of its own.
_LOCAL_MARK = "SHARDWISE_WORKER"


def _integer(environment: Mapping[str, str], name: str, default: int = 0) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise errors.UserError(f"{name} is {text!r} in the environment; it must be a whole number.") from None


def _check(workers: int, threads: int, nodes: Nodes, max_restarts: int) -> None:
    if workers < 1 or threads < 1:
        raise errors.UserError(f"{workers} workers with {threads} threads were asked for; both must be at least 1.")
    if max_restarts < 0:
        raise errors.UserError(f"--max-restarts is {max_restarts}; it must be 0 or more.")
    if workers % nodes.count:
        raise errors.UserError(
            f"{workers} workers do not divide over {nodes.count} nodes; every node gets the same number of workers."
        )


def _run_inline(worker: Callable[[Rank], T], rank: Rank, threads: int) -> T:
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        return worker(rank)
    finally:
        torch.set_num_threads(before)
        give_freed_memory_back()  # the process is its owner's again


def _run_as_rank(
    worker: Callable[[Rank], T],
    rank: Rank,
    workers: int,
    threads: int,
    nodes: Nodes,
    max_restarts: int,
    report: Callable[[str], None],
) -> T:
    if workers != rank.workers:
        raise errors.UserError(
            f"torchrun (or the environment) started {rank.workers} workers, the run asks for {workers}. Start as many "
            "as the plan needs (--nnodes times --nproc-per-node), or leave the number of workers out."
        )
    if rank.rank == 0 and (max_restarts or nodes.count > 1):
        report("started by torchrun: its own --nnodes and --max-restarts count, the run's settings for them do not.")
    # `record` leaves the traceback where torchrun looks for the first failure.
    result: T = cast(Callable[..., Any], record(_run_inline))(worker, rank, threads)
    return result


def _crew_environment(threads: int, host: str) -> dict[str, str]:
    environment = {_LOCAL_MARK: "1", "OMP_NUM_THREADS": str(threads)}
    interface = network.interface_towards(host)
    if interface is not None and "GLOO_SOCKET_IFNAME" not in os.environ:
        environment["GLOO_SOCKET_IFNAME"] = interface
    return environment


def _agent(crew: Crew, nodes: Nodes, max_restarts: int) -> RankAgent:
    rendezvous = FixedRendezvous(
        node=nodes.node_rank,
        nodes=nodes.count,
        endpoint=nodes.address(),
        run_id=nodes.run_id,
        join_seconds=nodes.join_seconds,
        workers=crew.local_workers,
        method=crew.start_method,
        cancelled=lambda: bool(crew.signals),
        report=crew.report,
    )
    spec = WorkerSpec(
        role="worker",
        local_world_size=crew.local_workers,
        rdzv_handler=rendezvous,
        entrypoint="shardwise",
        max_restarts=max_restarts,
        monitor_interval=1e-4,  # the agent waits for events itself, see _monitor_workers
    )
    return RankAgent(spec, rendezvous, crew)


def _run_agent(agent: RankAgent, signals: list[int]) -> None:
    """Runs the agent in a thread of its own, from which the workers are forked (see run/process.py for the reason)."""
    raised: list[BaseException] = []

    def run() -> None:
        # Inherited by the workers, which lift it when they are ready: a stop signal that comes while one starts waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            agent.run()
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            raised.append(error)

    use_one_heap()
    thread = threading.Thread(target=run, name="shardwise launcher", daemon=True)
    with handling(signals.append):
        thread.start()
        try:
            thread.join()
        finally:
            if thread.is_alive():  # the caller is being torn down: take the workers along
                signals += [signal.SIGTERM, signal.SIGTERM]
                thread.join()
    agent.forget_store()
    for error in raised:
        if isinstance(error, (RendezvousError, errors.UserError)):
            # Its frames hold the store as well.
            traceback.clear_frames(error.__traceback__)
        if isinstance(error, RendezvousError):
            if isinstance(error, RendezvousGracefulExitError):
                raise errors.Stopped("stopped while waiting for the other nodes; nothing had started")
            raise errors.RunFailed(str(error))
        raise error


def _result(agent: RankAgent, report: Callable[[str], None]) -> Any:
    if agent.failure is not None:
        if agent.failure.details:
            report(agent.failure.details.rstrip())
        raise agent.failure.error()
    if agent.stopped is not None:
        raise errors.Stopped(agent.stopped)
    return pickle.loads(agent.result)
