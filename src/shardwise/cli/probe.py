"""`shardwise probe`: what is this machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shardwise.errors import UserError
from shardwise.units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from shardwise.spec.machine import Machine
    from shardwise.spec.measured import Measured

_SHOWN = ("matmul", "convolution", "convolution_backward", "attention", "copy", "max_pool2d_with_indices", "tanh")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write the machine file here too (.toml).")
@click.option("--again", is_flag=True, help="Measure again although this machine's figures are at hand.")
@click.option("--check", type=click.Path(path_type=Path), metavar="FILE", help="Only say whether a file holds here.")
@click.option(
    "--nnodes", type=int, default=1, show_default=True, metavar="N", help="Machines; run the command on each."
)
@click.option("--node-rank", type=int, default=0, show_default=True, metavar="I", help="Number of this machine.")
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where the machines meet: an address of machine 0.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def probe(
    out: Path | None,
    again: bool,
    check: Path | None,
    nnodes: int,
    node_rank: int,
    rdzv_endpoint: str | None,
    as_json: bool,
) -> None:
    """Measure this machine: rates of computation, memory bandwidth, times of messages, start-up.

    The figures are kept, so that a second call answers at once. `shardwise plan` and `train` use them; --out writes them to
    a file that `--machine` takes. With --nnodes, messages between machines are measured too, and go into the file alone.
    """
    from shardwise.cli.main import print_json
    from shardwise.probe.machine import probe as measure
    from shardwise.probe.machine import probe_nodes
    from shardwise.probe.place import WAIT_SECONDS, cached_machine, cached_path, measuring, this_place, warnings_about
    from shardwise.run.launch import Nodes
    from shardwise.spec.machine import Machine

    if check is not None:
        _check(Machine.read(check), check, as_json)
        return
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.resolve().parent} does not exist")
    nodes = Nodes(count=nnodes, node_rank=node_rank, endpoint=rdzv_endpoint, run_id="shardwise probe")
    if nnodes > 1 and out is None and not as_json:
        raise UserError(f"--nnodes {nnodes}: also give --out FILE: what is kept is for this machine alone")
    machine = None if again else cached_machine()
    fresh = machine is None
    if machine is None:
        with measuring(wait_seconds=WAIT_SECONDS):
            machine = None if again else cached_machine()  # another command may just have measured it
            fresh = machine is None
            machine = machine or measure(tell=lambda text: print(text, file=sys.stderr))
        kept = cached_path(this_place())
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            machine.write(kept)
        except OSError as error:
            print(f"the figures cannot be kept in {kept}: {error.strerror}", file=sys.stderr)
    if nnodes > 1:
        machine = probe_nodes(machine, nodes, tell=lambda text: print(text, file=sys.stderr))
    measured = machine.measured
    assert measured is not None
    if out is not None:
        try:
            machine.write(out)
        except OSError as error:
            raise UserError(f"--out {out} cannot be written: {error.strerror}") from error
    if as_json:
        print_json({"measured_now": fresh, **machine.to_dict()})
        return
    click.echo("\n".join(_lines(measured)))
    if not fresh:
        click.echo(f"measured on {measured.date} and kept; --again measures anew")
    for warning in warnings_about(measured, this_place()):
        click.echo(f"note: {warning}")


def _check(machine: Machine, path: Path, as_json: bool) -> None:
    from shardwise.cli.main import print_json
    from shardwise.probe.place import this_place, warnings_about

    if machine.measured is None:
        raise UserError(f"--check {path}: it was written by hand: it has no measured figures to check")
    found = warnings_about(machine.measured, this_place())
    if as_json:
        print_json({"holds": not found, "reasons": found})
    else:
        click.echo(f"{path} holds here" if not found else f"{path} does not hold here:")
        for reason in found:
            click.echo(f"  {reason}")
    if found:
        raise SystemExit(1)


def _lines(measured: Measured) -> list[str]:
    place = measured.place
    lines = [
        f"{place.get('processor')}: {measured.cores} cores, {format_bytes(measured.memory_bytes)}, "
        f"accelerators: {place.get('accelerators')}, torch {place.get('torch')}",
    ]
    configurations = sorted({(item.workers, item.threads) for item in measured.kernels})
    for workers, threads in configurations:
        lines.append(
            f"{workers} {'process' if workers == 1 else 'processes at once'} with {threads} "
            f"{'thread' if threads == 1 else 'threads each'}:"
        )
        for kind in _SHOWN:
            for precision in ("fp32", "bf16"):
                rates = [
                    item
                    for item in measured.kernels
                    if (item.kind, item.precision, item.workers, item.threads) == (kind, precision, workers, threads)
                ]
                if rates:
                    lines.append(f"  {_rates(kind, precision, rates)}")
    lines.append("messages, by size:")
    lines += [f"  {line}" for line in _messages(measured)]
    lines.append(
        f"an operation takes {format_seconds(measured.call_seconds)} at least, {format_seconds(measured.graph_seconds)} "
        f"more with its gradient; a product beside a message takes {measured.overlap_slowdown:.2f} times as long"
    )
    lines.append(
        f"two workers are ready after {format_seconds(measured.startup_seconds)}; an idle worker holds "
        f"{format_bytes(measured.worker_bytes)}"
    )
    return lines


def _rates(kind: str, precision: str, rates: list[Any]) -> str:
    unit = "B/s" if rates[0].kind in ("copy", "max_pool2d_with_indices", "tanh") else "FLOP/s"
    text = ", ".join(format_rate(item.per_second, unit) for item in sorted(rates, key=lambda one: one.size))
    return f"{kind} {precision}: {text}"


def _messages(measured: Measured) -> list[str]:
    tables: dict[tuple[str, str, int, str, int], list[str]] = {}
    for item in sorted(measured.messages, key=lambda one: one.message_bytes):
        key = (item.collective, item.way, item.ranks, item.placement, item.nodes)
        tables.setdefault(key, []).append(f"{format_bytes(item.message_bytes)} {format_seconds(item.seconds)}")
    return [
        f"{collective}, {ranks} ranks ({placement}{f', {nodes} nodes' if nodes > 1 else ''}), {way}: {', '.join(texts)}"
        for (collective, way, ranks, placement, nodes), texts in tables.items()
    ]
