"""The mesh puts every rank in the right group along every axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shardwise.dist.mesh import Mesh
from shardwise.spec.layout import Layout


def _walk(text: str) -> dict[str, Any]:
    layout = Layout.parse(text)
    rank = torch.distributed.get_rank()
    mesh = Mesh(layout, rank)
    found: dict[str, Any] = {}
    for axes in (("data",), ("tensor",), ("data", "tensor"), ("pipeline", "tensor"), ("data", "shard", "expert")):
        group = mesh.group(*axes)
        found["+".join(axes)] = [int(r) for r in group.gather(torch.tensor(rank)).tolist()]
        assert group.rank == found["+".join(axes)].index(rank)
    found["place"] = {axis: mesh.coordinate(axis) for axis in ("pipeline", "data", "tensor")}
    wanted = [axis for axis in ("pipeline", "data", "tensor") if layout.degrees[axis] > 1]
    found["torch"] = {axis: mesh.device_mesh(axis).get_local_rank() for axis in wanted}
    return found


def test_groups_of_a_three_axis_mesh(ranks: Callable[..., list[Any]]) -> None:
    """pipeline=2,data=2,tensor=2: tensor neighbours are adjacent ranks, stages are far apart."""
    found = ranks(8, _walk, "data=2,tensor=2,pipeline=2")
    assert found[0]["tensor"] == [0, 1]
    assert found[5]["tensor"] == [4, 5]
    assert found[0]["data"] == [0, 2]
    assert found[7]["data"] == [5, 7]
    assert found[6]["data+tensor"] == [4, 5, 6, 7]
    assert found[2]["pipeline+tensor"] == [2, 3, 6, 7]
    assert found[6]["place"] == {"pipeline": 1, "data": 1, "tensor": 0}
    for answer in found:
        assert answer["torch"] == answer["place"]


def test_one_axis_is_the_whole_world(ranks: Callable[..., list[Any]]) -> None:
    for rank, answer in enumerate(ranks(3, _walk, "data=3")):
        assert answer["data"] == [0, 1, 2]
        assert answer["tensor"] == [rank]
        assert answer["data+shard+expert"] == [0, 1, 2]


def test_device_mesh_without_axes_is_refused() -> None:
    with pytest.raises(ValueError, match="degree above 1"):
        Mesh(Layout(), 0).device_mesh("data")
