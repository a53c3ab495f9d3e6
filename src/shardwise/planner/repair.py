"""Rows that lack something or contradict themselves: the nearest row that can be predicted, and what was assumed.

A table of other people's runs has blanks, foreign names and slips. Each rule here changes as little as it can and says so,
so that every row is answered and nobody takes a guess for knowledge.
"""

from shardwise.planner import catalogue
from shardwise.planner.runs import Row

ASPECT = 128
"""Width over depth where one of them is unknown; between 50 and 200 hardly matters (Kaplan et al. 2020, figure 5)."""

USUAL_HARDWARE = "a100-80gb-sxm"
USUAL_SEQUENCE = 2048
AXES = ("data", "tensor", "pipeline", "context")


def repair(row: Row) -> tuple[Row, tuple[str, ...]]:
    """The row to predict and, in words, what it takes for granted; a sound row is returned as it is.

    Layers and hidden width both unknown stay unknown: no rule can guess the size of a model.
    """
    fixed = {key: value for key, value in row.items() if key != "assumed"}
    told = [str(row["assumed"])] if "assumed" in row else []
    _hardware(fixed, told)
    _model(fixed, told)
    _degrees(fixed, told)
    _stages(fixed, told)
    _batch(fixed, told)
    return fixed, tuple(told)


Fixed = dict[str, str | int | float]


def hardware_of(row: Row) -> str:
    """The catalogue's name of the part that a row is taken as."""
    return catalogue.canonical_name(str(row.get("hardware", ""))) or USUAL_HARDWARE


def _hardware(row: Fixed, told: list[str]) -> None:
    name = str(row.get("hardware", ""))
    if catalogue.canonical_name(name) is None:
        row["hardware"] = USUAL_HARDWARE
        what = f"{name!r} is not in the catalogue" if name else "is unknown"
        told.append(f"hardware {what}: taken as {USUAL_HARDWARE}")


def _model(row: Fixed, told: list[str]) -> None:
    if "seq_len" not in row:
        row["seq_len"] = USUAL_SEQUENCE
        told.append(f"seq_len is unknown: taken as {USUAL_SEQUENCE}")
    if "hidden" in row and "layers" not in row:
        row["layers"] = max(1, round(int(row["hidden"]) / ASPECT))
        told.append(f"layers are unknown: taken as {row['layers']}")
    if "layers" in row and "hidden" not in row:
        row["hidden"] = ASPECT * int(row["layers"])
        told.append(f"hidden is unknown: taken as {row['hidden']}")
    experts = int(row.get("experts", 0))
    chosen = int(row.get("experts_per_token", 0))
    if chosen > experts or (experts and "experts_per_token" in row and not chosen):
        row["experts_per_token"] = min(max(chosen, 1), experts)
        told.append(f"experts_per_token={chosen} of {experts} experts: taken as {row['experts_per_token']}")
    if int(row.get("kv_heads", 1)) > int(row.get("heads", row.get("kv_heads", 1))):
        told.append(f"kv_heads={row['kv_heads']} exceeds heads={row['heads']}: taken as equal")
        row["kv_heads"] = row["heads"]


def _degrees(row: Fixed, told: list[str]) -> None:
    """Make the degrees multiply to the workers: `data` gives way first, then the number of workers."""
    if "gpus" not in row:
        return
    gpus = int(row["gpus"])
    degrees = {axis: int(row[axis]) for axis in AXES if axis in row}
    product = 1
    for degree in degrees.values():
        product *= degree
    model_ways = product // degrees.get("data", 1)
    if product == gpus or ("data" not in row and gpus % model_ways == 0):
        return
    before = ", ".join(f"{axis}={degree}" for axis, degree in degrees.items()) or "no degrees"
    if gpus % model_ways == 0:
        row["data"] = gpus // model_ways
        told.append(f"{before} do not make {gpus} workers: data taken as {row['data']}")
    else:
        row["gpus"] = product
        told.append(f"{before} do not divide {gpus} workers: taken as {product} workers")


def _stages(row: Fixed, told: list[str]) -> None:
    """No more chunks than layers."""
    if "layers" not in row or "pipeline" not in row or "virtual_stages" not in row:
        return
    most = max(1, int(row["layers"]) // int(row["pipeline"]))
    if int(row["virtual_stages"]) > most:
        told.append(f"virtual_stages={row['virtual_stages']} needs more than {row['layers']} layers: taken as {most}")
        row["virtual_stages"] = most


def _batch(row: Fixed, told: list[str]) -> None:
    """No rank can pass more sequences at once than a step has for it."""
    if "global_batch" not in row or "micro_batch" not in row:
        return
    share = max(1, int(row["global_batch"]) // int(row.get("data", 1)))
    if int(row["micro_batch"]) > share:
        told.append(f"micro_batch={row['micro_batch']} exceeds the {share} sequences of a rank: taken as {share}")
        row["micro_batch"] = share
