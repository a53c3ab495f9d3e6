"""The fitted constants: few, named, bounded, one set for all hardware, models and frameworks.

Everything else in the planner is a formula or a datasheet figure. The values were found by the search in
`benchmarks/fit_planner.py` and settled by hand with all published tables in view; docs/accuracy.md says how well the
same search does on sources it has not seen.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What no datasheet says.

    Attributes:
        matmul_rate: rate of a large training matrix product over the best shape of a search on that part.
        matmul_inner_half: inner dimension at which a tile reaches half of its rate on an A100 (its prologue and epilogue).
        memory_rate: rate of an element-wise kernel over the nominal memory bandwidth.
        attention_rate: fused attention in training over the published rate of that kernel.
        eager_traffic: bytes moved by element-wise kernels over the bytes of perfectly fused ones, not compiled.
        launch_seconds: host time per kernel of an eager training step.
        kernel_seconds: shortest duration of one kernel on the device.
        network_rate: achieved share of the nominal network of a rank.
        link_rate: achieved share of the nominal link inside a node.
        overlap_cost: share of hidden communication at the rate of the link inside a node that still delays compute (shared
            multiprocessors and memory).
        gradient_overlap: share of the gradient reduction of replicas that the last backward pass can hide.
        step_seconds: fixed time of one step: loss read back, optimizer start, data hand-over.
        hop_share: one step of a ring over ranks of several nodes, over the latency between nodes.
        tensor_overlap: share of the communication of sequence-parallel tensor ranks that hides behind their products.
        host_norm: device and host time of t tensor ranks are joined by a norm of exponent 1 + host_norm / log2(t); 1 is
            their sum, without end (one rank) the maximum.
    """

    matmul_rate: float = 0.875
    matmul_inner_half: float = 130.0
    memory_rate: float = 0.83
    attention_rate: float = 0.565
    eager_traffic: float = 1.65
    launch_seconds: float = 2.1e-5
    kernel_seconds: float = 4.5e-6
    network_rate: float = 0.8
    link_rate: float = 0.65
    overlap_cost: float = 0.28
    gradient_overlap: float = 0.95
    step_seconds: float = 0.001
    hop_share: float = 0.7
    tensor_overlap: float = 0.2
    host_norm: float = 1.5


BOUNDS: dict[str, tuple[float, float]] = {
    "matmul_rate": (0.7, 1.0),
    "matmul_inner_half": (32.0, 512.0),
    "memory_rate": (0.6, 0.95),
    "attention_rate": (0.4, 1.0),
    "eager_traffic": (1.0, 3.0),
    "launch_seconds": (4e-6, 3e-5),
    "kernel_seconds": (1e-6, 5e-6),
    "network_rate": (0.5, 0.85),
    "link_rate": (0.58, 0.9),
    "overlap_cost": (0.0, 0.4),
    "gradient_overlap": (0.0, 0.95),
    "step_seconds": (0.0, 0.05),
    "hop_share": (0.5, 1.0),
    "tensor_overlap": (0.0, 0.8),
    "host_norm": (0.5, 8.0),
}
"""Physically possible range of every constant; the fit may not leave it."""

DEFAULT = Constants()


def check_bounds(constants: Constants) -> None:
    """Raise ValueError if a constant is outside its physical range."""
    for item in fields(constants):
        low, high = BOUNDS[item.name]
        value = getattr(constants, item.name)
        if not low <= value <= high:
            raise ValueError(f"constant {item.name}={value:g} is outside {low:g} to {high:g}")
