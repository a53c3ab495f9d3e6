"""Machine: what the planner knows about the hardware. Every figure says whether it was measured and where it comes from."""

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import tomli_w

from shardwise.errors import UserError
from shardwise.spec.measured import COLLECTIVES, Measured
from shardwise.spec.software import Software

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Origin = Literal["measured", "nominal"]


@dataclass(frozen=True)
class Figure:
    """One number with its origin: `nominal` from a datasheet, or `measured`; the unit is in the name of the field."""

    value: float
    origin: Origin = "nominal"
    source: str = ""

    def __post_init__(self) -> None:
        if self.origin not in ("measured", "nominal"):
            raise UserError(f"figure origin {self.origin!r}: it must be measured or nominal")
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not self.value > 0:
            raise UserError(f"figure value {self.value!r}: it must be a number above 0")

    def __str__(self) -> str:
        return f"{self.value:g} ({self.origin}: {self.source or 'no source given'})"


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One compute device.

    Attributes:
        name: catalogue name, such as `a100-80gb-sxm`.
        memory_bytes: what the device reports as its memory.
        memory_bytes_per_second: bandwidth of the device memory.
        peak_flops: dense peak rate by precision (`fp32`, `fp16`, `bf16`, `fp8`, `fp4`), FLOP/s, without sparsity.
        matmul_fraction: best matrix product over the peak, by precision; a search over shapes, so an upper bound.
        attention_fraction: rate of a long fused causal attention, forward and backward, over the bf16 peak.
        multiprocessors: units that matrix tiles are spread over.
        power_watts: board power limit.
    """

    name: str
    memory_bytes: Figure
    memory_bytes_per_second: Figure
    peak_flops: Mapping[str, Figure]
    matmul_fraction: Mapping[str, Figure]
    attention_fraction: Figure
    multiprocessors: Figure
    power_watts: Figure | None = None


@dataclass(frozen=True, kw_only=True)
class Link:
    """A connection as one rank sees it: bytes per second and direction, and seconds until the first byte arrives."""

    bytes_per_second: Figure
    latency_seconds: Figure


@dataclass(frozen=True, kw_only=True)
class CollectiveRate:
    """Bus bandwidth of one collective over whole nodes, bytes per second, measured at one message size."""

    collective: str
    nodes: int
    message_bytes: float
    bus_bytes_per_second: Figure

    def __post_init__(self) -> None:
        if self.collective not in COLLECTIVES:
            raise UserError(f"collective {self.collective!r}: it must be one of {', '.join(COLLECTIVES)}")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal accelerators: a fast link inside a node, a slower one between nodes.

    Attributes:
        name: shown in answers.
        accelerator: the device of every rank.
        gpus_per_node: ranks that share the fast link.
        intra: link between two ranks of one node.
        inter: share of the network of one rank.
        rates: measured bus bandwidths of collectives; where present they replace the estimate from `inter`.
        pending_send_seconds: measured delay, per rank of the group, of a tensor collective that is issued while the
            pipeline waits for a transfer between nodes; None where nobody saw one.
        measured: what `shardwise probe` found on this machine; None for a machine nobody probed.
        software: what measured runs of a user say about the software there; None where nobody gave any.
    """

    name: str
    accelerator: Accelerator
    gpus_per_node: int
    intra: Link
    inter: Link
    rates: tuple[CollectiveRate, ...] = field(default=())
    pending_send_seconds: Figure | None = None
    measured: Measured | None = None
    software: Software | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gpus_per_node, int) or self.gpus_per_node < 1:
            raise UserError(
                f"machine {self.name}: gpus_per_node is {self.gpus_per_node!r}: give a whole number of at least 1"
            )

    def with_network(self, gbits_per_second: float, source: str) -> "Machine":
        """The same nodes joined by a network of so many Gbit/s per rank."""
        speed = Figure(gbits_per_second * 1e9 / 8, "nominal", source)
        return replace(self, inter=replace(self.inter, bytes_per_second=speed))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for TOML and JSON; `from_dict` reads it back."""
        record: dict[str, Any] = _without_none(asdict(self))
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Machine":
        """Build a machine from plain data.

        Raises:
            UserError: a part is missing, unknown or of the wrong kind; the message names it.
        """
        try:
            device = dict(record["accelerator"])
            for name in ("memory_bytes", "memory_bytes_per_second", "attention_fraction", "multiprocessors"):
                device[name] = _figure(device[name])
            for name in ("peak_flops", "matmul_fraction"):
                device[name] = {key: _figure(value) for key, value in device[name].items()}
            if "power_watts" in device:
                device["power_watts"] = _figure(device["power_watts"])
            return cls(
                name=str(record["name"]),
                accelerator=Accelerator(**device),
                gpus_per_node=record["gpus_per_node"],
                intra=_link(record["intra"]),
                inter=_link(record["inter"]),
                rates=tuple(_rate(rate) for rate in record.get("rates", ())),
                pending_send_seconds=_figure(record["pending_send_seconds"])
                if "pending_send_seconds" in record
                else None,
                measured=Measured.from_dict(record["measured"]) if "measured" in record else None,
                software=Software.from_dict(record["software"]) if "software" in record else None,
            )
        except KeyError as error:
            raise UserError(
                f"machine: {error.args[0]!r} is missing; `shardwise probe` writes complete machine files"
            ) from error
        except (TypeError, AttributeError) as error:
            raise UserError(f"machine: {error}; `shardwise probe` writes machine files of the right form") from error

    @classmethod
    def read(cls, path: Path) -> "Machine":
        """Read a machine file (TOML)."""
        return cls.from_dict(read_toml(path, "machine file"))

    def write(self, path: Path) -> None:
        """Write a machine file (TOML), whole or not at all: others may read it meanwhile."""
        text = tomli_w.dumps(self.to_dict())
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")  # a pipe or a terminal
            return
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def __str__(self) -> str:
        gbytes = self.intra.bytes_per_second.value / 1e9
        gbits = self.inter.bytes_per_second.value * 8 / 1e9
        node = f"{self.gpus_per_node} x {self.accelerator.name} per node"
        return f"{self.name}: {node}, {gbytes:g} GB/s inside, {gbits:g} Gbit/s per rank outside"


def read_toml(path: Path, kind: str) -> dict[str, Any]:
    """The content of a TOML file; errors name the file and say what kind of file it should be."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{kind} {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{kind} {path} is not TOML: {error}") from error


def _figure(value: Any) -> Figure:
    return Figure(**value) if isinstance(value, Mapping) else Figure(float(value))


def _link(record: Mapping[str, Any]) -> Link:
    return Link(
        bytes_per_second=_figure(record["bytes_per_second"]), latency_seconds=_figure(record["latency_seconds"])
    )


def _rate(record: Mapping[str, Any]) -> CollectiveRate:
    return CollectiveRate(**{**record, "bus_bytes_per_second": _figure(record["bus_bytes_per_second"])})


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_without_none(item) for item in value]
    return value
