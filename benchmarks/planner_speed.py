"""How long the planner's arithmetic takes: CPU seconds of one process, for tables, searches and whole commands.

    python benchmarks/planner_speed.py [--rows 10000] [--tables FOLDER ...] [--only tables|searches|commands]

Tables: `benchmarks/published`, folders that are given, and rows made up from a seed, the worst kind: every row another model,
machine and layout, nine of ten with a pipeline of up to 64 ranks, which is simulated, and half of them with cells left blank,
which asks for every choice. Searches: counted jobs on 64 devices of the catalogue, and described transformers on 3,072. Commands:
whole processes, imports included. Nothing is kept from one case to the next beside what the planner itself keeps.
"""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from shardwise.planner import catalogue
from shardwise.planner.jobsearch import JobProblem, search_job
from shardwise.planner.predict import predict_runs, write_csv
from shardwise.planner.runs import read_runs
from shardwise.planner.search import Problem, search
from shardwise.spec.facts import Transformer
from shardwise.spec.plan import Plan
from shardwise.spec.work import JobFacts

PUBLISHED = Path(__file__).parent / "published"
BLANKABLE = (
    "micro_batch",
    "zero_stage",
    "virtual_stages",
    "expert",
    "recompute",
    "attention",
    "precision",
    "compile",
    "schedule",
)
TRILLION = "gpt:layers=128,hidden=25600,heads=160,seq=2048,vocab=51200"
EXPERTS = "llama:layers=61,hidden=7168,heads=128,ffn=2048,vocab=129280,experts=256,experts_per_token=8,seq=32768"


def made_up_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows in the canonical columns, no two alike."""
    draw = random.Random(seed)
    return [_row(draw, f"r{index}") for index in range(count)]


def _row(draw: random.Random, name: str) -> dict[str, object]:
    heads = draw.choice((8, 12, 16, 20, 24, 32, 40, 64, 96, 128))
    per_node = draw.choice((4, 8, 8, 8, 16))
    tensor = draw.choice((1, 1, 2, 4, 8))
    pipeline = draw.choice((1, 2, 2, 4, 4, 8, 8, 16, 32, 64))
    data = draw.choice((1, 1, 2, 4, 8, 16, 32, 64))
    context = draw.choice((1,) * 7 + (2, 4))
    chunks = draw.choice((1, 1, 2, 3, 4))
    micro_batch = draw.choice((1, 1, 2, 4, 8))
    micro_batches = draw.choice((1, 2, 3, 5, 8, 13, 16, 24, 32, 60, 64, 100, 128, 250, 256, 512, 1000))
    experts = draw.choice((0,) * 5 + (8, 64))
    row: dict[str, object] = {
        "run_id": name,
        "hardware": draw.choice(catalogue.NAMES),
        "gpus": data * tensor * pipeline * context,
        "gpus_per_node": per_node,
        "internode_gbps_per_gpu": draw.choice(("", 25, 100, 200, 400)),
        "layers": pipeline * chunks * draw.randint(1, 6) + draw.choice((0, 0, 1, 2)),
        "hidden": heads * draw.choice((64, 80, 96, 128)),
        "heads": heads,
        "kv_heads": draw.choice((heads, heads // 4)),
        "ffn_hidden": heads * draw.randint(128, 512),
        "gated_ffn": draw.randint(0, 1),
        "vocab": draw.randint(30_000, 256_000),
        "tied_embeddings": draw.randint(0, 1),
        "experts": experts,
        "experts_per_token": draw.randint(1, 8) if experts else 0,
        "seq_len": draw.choice((1024, 2048, 4096, 8192, 32768)),
        "global_batch": data * micro_batch * micro_batches,
        "micro_batch": micro_batch,
        "data": data,
        "zero_stage": draw.choice((0, 0, 1, 2, 3)),
        "tensor": tensor,
        "sequence_parallel": draw.randint(0, 1),
        "pipeline": pipeline,
        "virtual_stages": chunks,
        "context": context,
        "expert": draw.choice((1, 2, 8)) if experts else 1,
        "recompute": draw.choice(("none", "selective", "full")),
        "attention": draw.choice(("flash", "flash", "math")),
        "precision": draw.choice(("bf16", "bf16", "fp16", "fp8", "fp32")),
        "compile": draw.randint(0, 1),
        "schedule": draw.choice(
            ("1f1b", "1f1b", "gpipe", "interleaved", "interleaved", "zerobubble", "zbv", "dualpipev")
        ),
    }
    if draw.random() < 0.5:
        for blank in draw.sample(BLANKABLE, draw.randint(1, len(BLANKABLE))):
            row[blank] = ""
    return row


def write_rows(rows: Sequence[dict[str, object]], path: Path) -> None:
    """A table of `rows`."""
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def predict_table(path: Path) -> int:
    """Every step of `shardwise predict --table` but the start of the process; the number of rows."""
    found = list(predict_runs(read_runs(path, strict=False)))
    write_csv(found)
    return len(found)


def counted(job: str) -> JobFacts:
    """The facts of a job, counted as `shardwise plan` counts it for a machine of the catalogue."""
    from shardwise.data.source import as_splits
    from shardwise.probe.facts import facts_apart
    from shardwise.run.jobfile import find_job

    made = find_job(job).call({}).job
    return facts_apart(made, as_splits(made.data), fake=True)


def search_of_job(facts: JobFacts, workers: int = 64) -> int:
    """The ranking of a job's plans, as if all of them could run; how many were priced."""
    problem = JobProblem(facts=facts, machine=catalogue.machine("h100-80gb-sxm"), workers=workers)

    def runs(plans: Sequence[Plan]) -> list[str | None]:
        return [None for _ in plans]

    return search_job(problem, runs).priced


def search_of_model(text: str, workers: int = 3072) -> int:
    """The ranking of a transformer's layouts; how many were priced."""
    model, seq_len = Transformer.parse(text)
    machine = catalogue.machine("a100-80gb-sxm")
    return search(
        Problem(model=model, machine=machine, workers=workers, seq_len=seq_len, global_batch=3072, compile=False)
    ).priced


def told(name: str, work: Callable[[], int], unit: str) -> None:
    """Print the CPU seconds of `work` and what it says it did."""
    began = time.process_time()
    count = work()
    print(f"{name:48s} {time.process_time() - began:7.2f} s CPU  {count:6d} {unit}", flush=True)


def command(arguments: Sequence[str]) -> int:
    """Run `shardwise` in a process of its own."""
    run = [sys.executable, "-m", "shardwise.cli.main", *arguments]
    subprocess.run(run, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 1


def told_process(name: str, arguments: Sequence[str]) -> None:
    """Print the CPU seconds of a whole command, and how long it took."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command(arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{name:48s} {cpu:7.2f} s CPU  {time.perf_counter() - began:6.2f} s in all", flush=True)


def main() -> None:
    """Print one line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000, help="made-up rows")
    parser.add_argument("--seed", type=int, default=0, help="of the made-up rows")
    parser.add_argument("--tables", type=Path, nargs="*", default=[], help="folders with more tables")
    parser.add_argument("--only", choices=["tables", "searches", "commands"])
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made_up = Path(folder) / "made_up.csv"
        write_rows(made_up_rows(chosen.rows, chosen.seed), made_up)
        if chosen.only in (None, "tables"):
            told(f"{chosen.rows:,} made-up rows", lambda: predict_table(made_up), "rows")
            for each in (PUBLISHED, *chosen.tables):
                for path in sorted(each.glob("*.csv")):
                    if _has_runs(path):
                        told(path.name, lambda path=path: predict_table(path), "rows")  # type: ignore[misc]
        if chosen.only in (None, "searches"):
            for job in ("charlm", "digits", "moe"):
                facts = counted(job)
                told(f"search: {job} on 64 h100", lambda facts=facts: search_of_job(facts), "layouts")  # type: ignore[misc]
            for name, text in (("1T parameters", TRILLION), ("256 experts", EXPERTS)):
                told(f"search: {name} on 3,072 a100", lambda text=text: search_of_model(text), "layouts")  # type: ignore[misc]
        if chosen.only in (None, "commands"):
            answer = str(Path(folder) / "answer.csv")
            told_process("shardwise --help", ["--help"])
            told_process(
                f"shardwise predict, {chosen.rows:,} made-up rows",
                ["predict", "--table", str(made_up), "--out", answer],
            )
            wide = ["--machine", "a100-80gb-sxm", "--nodes", "384", "--batch", "3072"]
            told_process("shardwise plan --model, 1T parameters on 3,072", ["plan", "--model", TRILLION, *wide])
            told_process("shardwise plan charlm, 64 h100", ["plan", "charlm", "--machine", "h100", "--workers", "64"])


def _has_runs(path: Path) -> bool:
    """Whether a table is one of runs: its header, the first line that is no comment, has a column `layers`."""
    with path.open(encoding="utf-8") as lines:
        header = next((line for line in lines if not line.startswith("#")), "")
    return "layers" in header.split(",") and "run_id" in header.split(",")


if __name__ == "__main__":
    main()
