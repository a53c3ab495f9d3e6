"""Observer: turns each settlement into events: the steps, what each rank did, the experts' load, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from shardwise.monitor.straggler import Detector
from shardwise.nn.experts import expert_load, modules_with_experts
from shardwise.parallel.clip import global_norm
from shardwise.run.assemble import Assembly
from shardwise.run.choose import usable_cores
from shardwise.run.gauge import Gauge
from shardwise.run.ledger import Settlement
from shardwise.spec.events import Event, StepsEvent
from shardwise.spec.observations import BottleneckEvent, ExpertsEvent, RanksEvent, StragglerEvent

_MOST_RATES = 8  # learning rates of more parameter groups than these are left out of the events


@final
class Observer:
    """Watches one rank's training from inside. All ranks call `settled` alike, because it is collective.

    Args:
        assembly: what is trained.
        tell: writes an event; does nothing on ranks other than 0.
        say: shows a line to people.
        balances: the run sets the shares of the global batch itself.
    """

    def __init__(
        self, assembly: Assembly, tell: Callable[[Event], None], say: Callable[[str], None], *, balances: bool = False
    ) -> None:
        self._assembly, self._tell, self._say = assembly, tell, say
        self.gauge = Gauge(assembly.clock, assembly.device)
        self._has_experts = bool(modules_with_experts(assembly.model))
        self._detector = Detector(
            threads=assembly.plan.threads, cores=usable_cores(), device=assembly.device.type, balances=balances
        )

    def settled(self, settled: Settlement) -> RanksEvent:
        """Steps were settled: exchange what was measured and write it down. Collective."""
        a = self._assembly
        first_step = a.step - len(settled.losses)
        phase_seconds = a.clock.take()
        norm = settled.gradient_norm
        if norm is None:
            norm = float(global_norm(a.parameters, apart=a.composed.apart, counted=a.composed.counted))
        self._tell(
            StepsEvent(
                first_step=first_step,
                losses=settled.losses,
                seconds=settled.seconds,
                samples=sum(settled.samples),
                phase_seconds=phase_seconds,
                gradient_norm=norm,
                learning_rates=[
                    float(group["lr"]) for group in a.optimizer.param_groups[:_MOST_RATES] if "lr" in group
                ],
                objectives=settled.objectives,
            )
        )
        event = self.gauge.exchange(
            a.world, phase_seconds, first_step=first_step, seconds=settled.seconds, late_seconds=settled.late_seconds
        )
        self._tell(event)
        if self._has_experts:
            loads = expert_load(a.model)
            tokens = {name: list(load.tokens) for name, load in loads.items()}
            self._tell(
                ExpertsEvent(step=a.step, tokens=tokens, dropped={name: load.dropped for name, load in loads.items()})
            )
        for found in self._detector.update(event):
            self._tell(found)
            assert isinstance(found, StragglerEvent | BottleneckEvent)
            self._say(f"{found.kind}: {found.message}")
        return event
