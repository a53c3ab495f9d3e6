"""Collectives against the ring formulas, by placement, and against published measurements."""

import csv
import statistics
from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.planner import catalogue
from shardwise.planner.case import Case
from shardwise.planner.collectives import (
    Group,
    Network,
    all_gather,
    all_reduce,
    all_to_all,
    group,
    network,
    reduce_scatter,
    send,
)
from shardwise.planner.constants import DEFAULT
from shardwise.spec.facts import Transformer
from shardwise.spec.machine import CollectiveRate, Figure, Machine

TABLES = Path(__file__).parents[3] / "shared" / "tables"
LARGE = 4 * 2**30
NODE, TWO_NODES = Group(8, 8), Group(16, 8)


def machine() -> Machine:
    return catalogue.machine("a100-80gb-sxm", gbits_per_gpu=200)


def test_large_messages_move_at_the_bandwidth_of_a_ring() -> None:
    net = network(machine(), DEFAULT)
    link = 300e9 * DEFAULT.link_rate
    assert all_gather(LARGE, NODE, net) == pytest.approx(7 / 8 * LARGE / link, rel=0.01)
    assert reduce_scatter(LARGE, NODE, net) == pytest.approx(7 / 8 * LARGE / link, rel=0.01)
    assert all_reduce(LARGE, NODE, net) == pytest.approx(2 * 7 / 8 * LARGE / link, rel=0.01)
    assert send(LARGE, False, net) == pytest.approx(LARGE / link, rel=0.01)


def test_across_nodes_every_rank_brings_its_network() -> None:
    net = network(machine(), DEFAULT)
    wire = 25e9 * DEFAULT.network_rate
    assert all_gather(LARGE, TWO_NODES, net) == pytest.approx(
        15 / 16 * LARGE / min(8 * wire, 300e9 * DEFAULT.link_rate), rel=0.02
    )
    assert all_gather(LARGE, Group(2, 1), net) == pytest.approx(1 / 2 * LARGE / wire, rel=0.01)
    assert send(LARGE, True, net) == pytest.approx(LARGE / wire, rel=0.01)
    # half of the bytes of an all-to-all over two nodes leave the node, over the rank's own network
    assert all_to_all(LARGE, TWO_NODES, net) == pytest.approx(LARGE / 2 / wire, rel=0.01)


def test_one_rank_needs_no_communication() -> None:
    net = network(machine(), DEFAULT)
    for collective in (all_reduce, all_gather, reduce_scatter, all_to_all):
        assert collective(1e9, Group(1, 1), net) == 0.0


def test_time_grows_with_size_and_with_ranks() -> None:
    net = network(machine(), DEFAULT)
    for collective in (all_reduce, all_gather, all_to_all):
        by_size = [collective(2.0**power, NODE, net) for power in range(10, 34, 3)]
        assert by_size == sorted(by_size) and by_size[0] < by_size[-1]
        by_nodes = [collective(2.0**24, Group(8 * nodes, 8), net) for nodes in (1, 2, 4, 16, 64)]
        assert by_nodes == sorted(by_nodes)


def test_small_messages_cost_their_latency_more_ranks_more_of_it() -> None:
    net = network(machine(), DEFAULT)
    assert all_reduce(8, NODE, net) == pytest.approx(8 * 4e-6, rel=0.01)
    assert all_gather(8, Group(1024, 8), net) > 1023 * net.hop_seconds


def test_placement_of_axes_tensor_innermost() -> None:
    model = Transformer(layers=8, hidden=64, heads=8, kv_heads=8, ffn_hidden=256)
    layout = Case(
        model=model,
        machine=machine(),
        seq_len=8,
        global_batch=64,
        micro_batch=1,
        data=8,
        tensor=4,
        pipeline=2,
        context=2,
    )
    assert group(layout, "tensor") == Group(4, 4)
    assert group(layout, "context") == Group(2, 2)
    assert group(layout, "data") == Group(8, 1)
    assert group(layout, "pipeline") == Group(2, 1)
    assert group(replace(layout, tensor=1, context=1), "data") == Group(8, 8)


def test_measured_rates_replace_the_estimate_for_whole_nodes() -> None:
    rate = CollectiveRate(
        collective="all_gather", nodes=2, message_bytes=2.0**28, bus_bytes_per_second=Figure(10e9, "measured", "test")
    )
    net = network(replace(machine(), rates=(rate,)), DEFAULT)
    assert all_gather(2.0**28, TWO_NODES, net) == pytest.approx(15 / 16 * 2**28 / 10e9)
    assert all_gather(2.0**30, TWO_NODES, net) == pytest.approx(15 / 16 * 2**30 / 10e9)
    small = all_gather(2.0**20, TWO_NODES, net)
    assert 15 / 16 * 2**20 / 10e9 < small < all_gather(2.0**28, TWO_NODES, net)


def test_a_ring_over_parts_of_nodes_is_no_faster_than_what_whole_nodes_reach() -> None:
    def net(collective: str, rate: float) -> Network:
        found = CollectiveRate(
            collective=collective,
            nodes=2,
            message_bytes=2.0**28,
            bus_bytes_per_second=Figure(rate, "measured", "test"),
        )
        return network(replace(machine(), rates=(found,)), DEFAULT)

    nominal = network(machine(), DEFAULT)
    for collective, name in (
        (all_gather, "all_gather"),
        (reduce_scatter, "reduce_scatter"),
        (all_reduce, "all_reduce"),
    ):
        # four ranks of each of two nodes
        bound = collective(LARGE, Group(8, 4), net(name, 10e9))
        factor = 2.0 if name == "all_reduce" else 1.0
        assert bound == pytest.approx(factor * 7 / 8 * LARGE / 10e9, rel=0.01)
        assert bound > 2 * collective(LARGE, Group(8, 4), nominal)
        # a higher rate of whole nodes gives a part of them no more than its own network ports
        assert collective(LARGE, Group(8, 4), net(name, 500e9)) == collective(LARGE, Group(8, 4), nominal)
        # and within a node nothing changes
        assert collective(LARGE, Group(4, 4), net(name, 10e9)) == collective(LARGE, Group(4, 4), nominal)


def test_all_reduce_against_published_measurements() -> None:
    path = TABLES / "echo_nccl_allreduce_a100.csv"
    if not path.exists():
        pytest.skip("the published all-reduce measurements are not next to this repository")
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(line for line in handle if not line.startswith("#")))
    net = network(catalogue.machine("a100-40gb-sxm", gbits_per_gpu=200), DEFAULT)
    ratios = [
        all_reduce(float(row["message_bytes"]), Group(int(row["gpus"]), min(8, int(row["gpus"]))), net)
        / (float(row["time_us"]) * 1e-6)
        for row in rows
        if int(row["gpus"]) > 1 and int(row["message_bytes"]) >= 2**20
    ]
    assert len(ratios) > 80
    assert 0.7 < statistics.median(ratios) < 1.4
    assert statistics.median([abs(ratio - 1) for ratio in ratios]) < 0.35
