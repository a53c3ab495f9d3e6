"""What a loop of the user's own must not do on several workers: train copies apart, or in different modes."""

from __future__ import annotations

from typing import final

from torch import nn

from shardwise.errors import JobError
from shardwise.run.assemble import Assembly
from shardwise.run.keeper import written


@final
class Conduct:
    """Looks at the model between and in the steps of a loop. On one worker a loop may do as it likes."""

    def __init__(self, assembly: Assembly) -> None:
        self._assembly = assembly
        self._workers = assembly.world.size
        self._modules: list[nn.Module] = []

    def learning(self) -> float:
        """How many modules are in training mode; stages of a pipeline have each their own, and count none."""
        a = self._assembly
        if self._workers == 1 or a.composed.stages is not None:
            return 0.0
        self._modules = self._modules or list(a.model.modules())
        return float(sum(module.training for module in self._modules))

    def check_mode(self, learning: float, of_all: float) -> None:
        """Refuse workers in different modes; `of_all` is the sum of what `learning` said on each."""
        if of_all != learning * self._assembly.reports.size:
            raise JobError(
                f"step {self._assembly.step}: the model is in training mode (model.train()) on some workers and in evaluation "
                "mode (model.eval()) on others: worker 0 that draws a picture in evaluation mode, for one, puts it back before "
                "the next step"
            )

    def written(self) -> int:
        """How often the weights were written into, in place."""
        return written(self._assembly) if self._workers > 1 else 0

    def check_written(self, before: int) -> None:
        """A batch or round went by without a step: refuse weights that were changed in it."""
        if self.written() != before:
            raise JobError(
                "the weights changed, but the batch was not given to run.step(): with an optimizer.step() of its own, "
                f"each of {self._workers} workers trains alone, on its own part of the data. Replace the forward pass, "
                "backward(), optimizer.step() and zero_grad() by loss = run.step(batch)"
            )
