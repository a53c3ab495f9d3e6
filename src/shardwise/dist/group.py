"""The process group: made here and nowhere else.

Raw gloo answers a wait that is too long with "Timed out waiting 1800000ms for recv operation". What it means, and which
rank says so, is added here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore, rendezvous  # type: ignore[attr-defined]

from shardwise import errors
from shardwise.spec.rank import Rank

_TIMEOUT_TEXTS = ("timed out", "timeout")

_GLOO_THREAD = "pt_gloo_runloop"
"""How torch names the threads that run gloo's collectives (ProcessGroupGloo.cpp)."""

_IDLE_SECONDS = 10.0
_LOOK_SECONDS = 0.005
_POLL_SECONDS = 0.01

_numbers = itertools.count()
"""Numbers of the groups that this process makes: all ranks run the same script, so that the n-th is the same one everywhere."""


@contextmanager
def process_group(rank: Rank, device: str, timeout_seconds: float) -> Iterator[None]:
    """The default process group of all workers, while the block runs: gloo, and on an accelerator its own backend too.

    One worker gets no group at all: a serial run talks to nobody. A group that is there already (made by the script, or by
    what started it: Ray Train does) is taken as it is, and left to who made it.

    Args:
        rank: who this process is.
        device: device type of the run ("cpu", "cuda", ...); on an accelerator the device number local_rank becomes the
            current one.
        timeout_seconds: how long a collective waits for the other ranks.

    Raises:
        RunFailed: the other ranks did not come to a collective (or to the start) in time.
        UserError: the group that is there already is one of other ranks, or has no backend for what the run sends.
    """
    if rank.workers == 1:
        if device != "cpu":
            torch.accelerator.set_device_index(rank.local_rank)
        yield
        return
    if dist.is_initialized():
        _check_given(rank, device)
        with _timeouts_explained(rank, timeout_seconds):
            yield
        return
    timeout = timedelta(seconds=timeout_seconds)
    try:
        with _timeouts_explained(rank, timeout_seconds):
            _init(rank, device, timeout)
            yield
        # Left out when the block raised: the process is about to end, and leaving a group can wait for ranks that are gone.
        dist.destroy_process_group()
    finally:
        await_idle_threads()


def await_idle_threads() -> None:
    """Wait until gloo's threads have let go of the tensors they sent (Linux; at most some seconds, usually 10 ms).

    They outlive the group where anything still refers to it (a device mesh does), and may be about to drop the last
    reference to a tensor, for which they need Python. If Python ends first, its end ends the process by SIGABRT,
    "terminate called without an active exception".
    """
    deadline, looks = time.monotonic() + _IDLE_SECONDS, 0
    while looks < 2 and time.monotonic() < deadline:
        states = [_state(thread) for thread in Path("/proc/self/task").glob("*")]
        gloo = [state for name, state in states if name == _GLOO_THREAD]
        if not gloo:
            return
        looks = looks + 1 if set(gloo) == {"S"} else 0
        time.sleep(_LOOK_SECONDS)  # also lets a thread that waits for Python have it


def _state(thread: Path) -> tuple[str, str]:
    """A thread's name, and S where it sleeps, R where it runs or would like to (proc(5))."""
    try:
        name, _, rest = (thread / "stat").read_text(encoding="utf-8", errors="replace").partition("(")[2].rpartition(")")
    except OSError:  # it has just ended
        return "", ""
    return name, rest.split()[0]


def _check_given(rank: Rank, device: str) -> None:
    """Is the group that somebody else made the one this run needs?"""
    found, workers = dist.get_rank(), dist.get_world_size()
    if (found, workers) != (rank.rank, rank.workers):
        raise errors.UserError(
            f"the process group that is there already makes this process rank {found} of {workers}, but RANK and WORLD_SIZE "
            f"in the environment rank {rank.rank} of {rank.workers}. Both must agree, or end the group before."
        )
    backend = dist.get_backend_config()
    needed = {"cpu", device}
    if missing := needed - set(dist.BackendConfig(dist.Backend(backend)).get_device_backend_map()):
        wanted = "gloo" if device == "cpu" else f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
        raise errors.UserError(
            f"the process group that is there already (backend {backend}) cannot send tensors on {sorted(missing)[0]}, "
            f"which a run on {device} does. Make it with backend {wanted!r}."
        )
    if device != "cpu":
        torch.accelerator.set_device_index(rank.local_rank)


def _init(rank: Rank, device: str, timeout: timedelta) -> None:
    if device == "cpu":
        backend, device_id = "gloo", None
    else:
        torch.accelerator.set_device_index(rank.local_rank)
        # gloo beside it, for what lives on the CPU: flags, counts, checkpoint plans.
        backend = f"cpu:gloo,{device}:{dist.get_default_backend_for_device(device)}"
        device_id = torch.device(device, rank.local_rank)
    # A launcher may keep one store over restarts and over the runs of one script: keys of their own keep the addresses of
    # ranks and groups that are gone from being found.
    store = _store(rank, timeout)
    if rank.endpoint is not None:
        keys = f"restart/{rank.restarts}/group/{next(_numbers)}"
    else:
        keys = f"meeting/{_meeting(PrefixStore('shardwise/meet', store), rank, timeout.total_seconds())}"
    store = PrefixStore(f"shardwise/{keys}", store)
    dist.init_process_group(
        backend, store=store, rank=rank.rank, world_size=rank.workers, timeout=timeout, device_id=device_id
    )


def _meeting(store: Store, rank: Rank, timeout_seconds: float) -> str:
    """A name that the ranks that are here now agree on, and no others before them. Collective.

    The number of the restart is none: torchrun counts the failures of each node's own workers, so that nodes that start again
    together have different ones. Each rank says hello with a name of its own. Rank 0 proposes a meeting of those it has heard,
    again whenever another one speaks for a rank, and closes it once all have said that they are in it.
    """
    own = uuid.uuid4().hex
    ranks = range(rank.workers)
    store.set(f"hello/{rank.rank}", own)
    proposed: list[str] = []
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if rank.rank == 0 and store.check([f"hello/{other}" for other in ranks]):
            heard = [name.decode() for name in store.multi_get([f"hello/{other}" for other in ranks])]
            if heard != proposed:
                proposed = heard
                store.set("proposed", json.dumps(proposed))
        if store.check(["proposed"]):
            names = json.loads(store.get("proposed"))
            if own in names:
                meeting = hashlib.sha256("".join(names).encode()).hexdigest()
                store.set(f"in/{meeting}/{rank.rank}", "1")
                if rank.rank == 0 and store.check([f"in/{meeting}/{other}" for other in ranks]):
                    store.set(f"closed/{meeting}", "1")
                if store.check([f"closed/{meeting}"]):
                    return meeting
        time.sleep(_POLL_SECONDS)
    raise RuntimeError(f"timed out after {timeout_seconds:g} s: the ranks did not all come to the store")


def _store(rank: Rank, timeout: timedelta) -> Store:
    if rank.endpoint is None:
        met: tuple[Store, int, int] = next(iter(rendezvous("env://", rank.rank, rank.workers, timeout=timeout)))
        return met[0]
    if rank.endpoint.startswith("/"):
        store = FileStore(rank.endpoint, rank.workers)
        store.set_timeout(timeout)
        return store
    host, _, port = rank.endpoint.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


@contextmanager
def _timeouts_explained(rank: Rank, timeout_seconds: float) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(text in str(error).lower() for text in _TIMEOUT_TEXTS):
            raise
        raise errors.RunFailed(
            f"rank {rank.rank} timed out: the other ranks did not all come to its collective within "
            f"{timeout_seconds:g} s. Usually one of them hangs, left the loop early or runs other code; the traceback "
            "shows where this rank waited. If they are only slow, allow more time.",
            rank=rank.rank,
            details=traceback.format_exc(),
        ) from error
