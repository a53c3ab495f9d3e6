"""What a calibration learned, in words and as plain data."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shardwise.planner.calibrate import Sample
from shardwise.planner.confidence import step_range
from shardwise.planner.software import NOISE, OWN, likeness, traits_of_run
from shardwise.spec.software import Software

ODD = 4.0
"""Noise over the usual one from which a run is told to be hardly believed: three standard deviations from the others."""

SHOWN = 5
"""Such runs that are named."""

SAME = 0.02
"""A factor closer to 1 is told as none."""


def learned(software: Software, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Sentences: the factors, what a step of the measured runs is taken as now, runs that are hardly believed, the ranges."""
    timed = [item for item in samples if item.run.step_seconds is not None]
    count = f"{len(samples)} measured run{'' if len(samples) == 1 else 's'}"
    memory = any(item.run.memory_bytes is not None or item.run.out_of_memory for item in samples)
    told = [f"learned from {count} of {software.source}: this software {_factors(software, memory)}"]
    if timed:
        case = timed[0].case
        low, high = step_range(replace(case, machine=replace(case.machine, software=software)))
        told.append(
            f"4 of 5 runs like {timed[0].run.row['run_id']} take {low:.2f} to {high:.2f} times their prediction now; "
            "it was {:.2f} to {:.2f} times without measured runs".format(*step_range(case))
        )
    others = "the other runs say" if len(timed) > 1 else "published runs take"
    odd = [item for item, run in zip(timed, software.runs, strict=True) if run.noise > ODD * NOISE**2]
    for item in odd[:SHOWN]:
        times = (item.run.step_seconds or 0.0) / item.estimate.step_seconds
        told.append(
            f"{item.run.row['run_id']} took {times:.2f} times its prediction, far from what {others}, and counts less: "
            "check its row"
        )
    if len(odd) > SHOWN:
        told.append(f"and so did {len(odd) - SHOWN} more")
    return tuple(told)


def kept_words(software: Software) -> str:
    """One sentence about what a machine file says."""
    factors = _factors(software, software.memory != 1.0)
    return f"the machine file learned from {software.source or 'measured runs'}: this software {factors or 'is as assumed'}"


def _factors(software: Software, memory: bool) -> str:
    """What the factors say; `memory`: whether any run told something about it."""
    parts = []
    if software.runs or software.compute != 1.0 or software.network != 1.0:
        parts.append(f"{_times(software.compute, 'as long')} to compute")
        if any(run.gpus > 1 for run in software.runs) or software.network != software.compute:
            parts.append(f"{_times(software.network, 'as long')} to communicate")
        own = [math.exp(OWN**2 * _own(software, index)) for index in range(len(software.runs))]
        if own and max(abs(math.log(value)) for value in own) > SAME:
            span = f"{min(own):.2f}" if max(own) < 1.005 * min(own) else f"{min(own):.2f} to {max(own):.2f}"
            parts.append(f"in runs like {'it' if len(own) == 1 else 'these'} {span} times as long again")
    words = f"takes {', '.join(parts)}" if parts else ""
    if memory:
        words += f"{', and ' if words else ''}needs {_times(software.memory, 'the memory')}"
    return words


def _own(software: Software, index: int) -> float:
    mine = traits_of_run(software.runs[index])
    return sum(run.weight * likeness(mine, traits_of_run(run)) for run in software.runs)


def _times(factor: float, what: str) -> str:
    if abs(math.log(factor)) <= SAME:
        return f"{what} as is assumed"
    return f"{factor:.2f} times {what}"


def learned_record(software: Software, samples: Sequence[Sample]) -> dict[str, Any]:
    """The same as plain data: the factors, and for every measured run what came out, what is predicted without and with them."""
    return {
        "source": software.source,
        "compute": software.compute,
        "network": software.network,
        "memory": software.memory,
        "told": list(learned(software, samples)),
        "runs": [
            {
                "run_id": str(item.run.row["run_id"]),
                "step_seconds": item.run.step_seconds,
                "memory_bytes": item.run.memory_bytes,
                "out_of_memory": item.run.out_of_memory,
                "predicted_step_seconds": item.estimate.step_seconds,
                "predicted_memory_bytes": item.estimate.memory.first,
                "assumed": list(item.assumed),
            }
            for item in samples
        ],
    }
