"""Tracing: one forward pass over the skeleton that writes down its calls.

Inputs are real tensors, parameters are stand-ins, so whatever depends on a parameter has a shape and no values, and what
depends on the inputs alone is computed as always: a mask made from tokens, a Python branch on the length of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import is_dataclass, replace
from typing import Any, NoReturn, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils import _pytree as pytree

from shardwise.dist.split import is_stand_in
from shardwise.errors import PlanError
from shardwise.parallel.grouped import GROUPED, in_shape
from shardwise.parallel.pipeline.again import without_reentrance
from shardwise.parallel.pipeline.gate import Session
from shardwise.parallel.pipeline.rehearse import rehearse
from shardwise.parallel.pipeline.skeleton import Fakes
from shardwise.parallel.pipeline.trace import Call, Own, Trace, Value
from shardwise.parallel.pipeline.watch import Watch, storage_key

_VALUE_QUESTIONS = {"tolist", "numpy", "__array__"}
"""Functions that read values without an operation that could be watched."""


@final
class CannotOpenError(PlanError):
    """A forward function cannot be walked through; run as a whole it may be fine.

    Attributes:
        module: its module's name; empty for the root.
    """

    def __init__(self, message: str, module: str) -> None:
        super().__init__(message)
        self.module = module


class _Again(BaseException):
    """The trace must be taken again; not an Exception, so that no handler in a forward function stops it."""


def take_trace(
    program: Callable[[nn.Module, Any], Any],
    skeleton: nn.Module,
    session: Session,
    inputs: Any,
    *,
    fakes: Fakes,
    opened: frozenset[str],
    forced: set[int],
    searching: bool = False,
) -> Trace:
    """Trace `program(skeleton, inputs)`.

    Args:
        program: calls the model; may compute the loss as well.
        skeleton: as `skeleton_of` makes it, gated with `session`.
        session: of the skeleton's gates.
        inputs: a tree of real tensors, not changed.
        fakes: made the skeleton's tensors.
        opened: modules whose forward functions are walked through; gated modules that are not opened are units.
        forced: numbers of calls that one stage makes although they depend on the inputs alone, because a stage changes
            their results in place. A guess from an earlier trace spares repetitions; what is found is added.
        searching: cuts are looked for: a module that picks by values is better not opened, because the calls inside may
            differ from pass to pass.

    Raises:
        PlanError: the forward pass depends on values that only one stage will have, or cannot be traced.
    """
    guessed = bool(forced)
    while True:
        copied = pytree.tree_map_only(Tensor, torch.clone, inputs)
        tracer = _Tracer(skeleton, copied, fakes, opened, forced)
        tracer.searching = searching
        try:
            # Drawing random numbers here must not shift those of the training.
            with torch.random.fork_rng(devices=[]), without_reentrance(), tracer.watch, tracer:
                session.handler = tracer
                session.forget()
                output = program(skeleton, copied)
            return tracer.finish(copied, output)
        except _Again:
            continue
        except CannotOpenError:
            if not guessed:
                raise
            guessed = False
            forced.clear()
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            tracer.refuse_values(error)
        finally:
            session.handler = None
            session.forget()


@final
class _Tracer(TorchFunctionMode):
    def __init__(
        self, skeleton: nn.Module, inputs: Any, fakes: Fakes, opened: frozenset[str], forced: set[int]
    ) -> None:
        super().__init__()
        self.watch = Watch()
        self.searching = False
        self._fakes = fakes
        self._opened = opened
        self._forced = forced
        self._inside = False
        self._stack: list[str] = []
        self._entries: dict[str, int] = {}
        self._calls: list[Call] = []
        self._asks_values = False
        # Storages whose values depend on those of the inputs; results of other calls depend on shapes alone.
        self._from_inputs = {storage_key(leaf) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)}
        self._values: list[Value] = []
        self._recent: set[int] = set()
        self._fresh: set[int] = set()
        self._regions: list[Any] = []
        self._samples: dict[int, Tensor] = {}
        self._tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._local: dict[int, tuple[Tensor, int]] = {}
        self._maker: dict[int, int] = {}
        named = [*skeleton.named_parameters(), *skeleton.named_buffers()]
        self._names = {id(tensor): name for name, tensor in named}
        self._storages = {storage_key(tensor): name for name, tensor in named}
        self._parameters = {name for name, _ in skeleton.named_parameters()}
        self._skeleton = skeleton

    # What the forward pass calls

    def __torch_function__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        kwargs = kwargs or {}
        run = in_shape if func is GROUPED else func
        if self._inside:
            return run(*args, **kwargs)
        return self._record(_name(func), None, run, args, kwargs)

    def module_call(self, name: str, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A gated module was called."""
        if self._inside or (self._stack and self._stack[-1] == name):
            return run(*args, **kwargs)
        self._entries.setdefault(name, len(self._calls))
        self._stack.append(name)
        try:
            if name in self._opened:
                return run(*args, **kwargs)
            self._inside = True
            return self._record(name, self._skeleton.get_submodule(name), run, args, kwargs)
        finally:
            self._inside = False
            self._stack.pop()

    def _record(
        self,
        name: str,
        module: nn.Module | None,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        number = len(self._calls)
        self._refuse_unseen()
        self._update_gradients()
        answer, rehearsed = self._run(module, run, args, kwargs)
        watch = self.watch
        arguments = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        uses = {self._numbers[id(leaf)] for leaf in arguments if id(leaf) in self._numbers}
        touched = self._touched(name, module, arguments)
        hidden = self._hidden(arguments)
        leaves, structure = pytree.tree_flatten(answer)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        bound = (
            number in self._forced
            or bool(uses | hidden)
            or watch.random
            or bool(touched & self._parameters)
            or bool(watch.written & set(self._storages))
        )
        question = module is None and not tensors and not watch.written
        from_inputs = bool(({storage_key(leaf) for leaf in arguments} | watch.read) & self._from_inputs)
        from_inputs |= question and any(map(self._unknown, arguments))
        asked = watch.asked or name.rpartition(".")[2] in _VALUE_QUESTIONS
        self._asks_values |= from_inputs and (rehearsed or ((question or not bound) and asked))
        if question:
            # Not a part of the trace: a stand-in answers some of these without telling anybody.
            watch.start()
            return answer
        changes: tuple[int, ...] = ()
        defines: tuple[int, ...] = ()
        if not bound:
            self._local.update((storage_key(leaf), (leaf, number)) for leaf in tensors)
            if from_inputs:
                self._from_inputs |= {storage_key(leaf) for leaf in tensors} | watch.written
        else:
            changes = self._changes(watch.written)
            defines = self._define(number, tensors)
            made = watch.made | {self._values[value].storage for value in defines}
            self._maker.update(dict.fromkeys(made - set(self._maker), number))
        self._calls.append(
            Call(
                name=name,
                everywhere=not bound,
                uses=tuple(sorted(uses)),
                defines=defines,
                changes=changes,
                tensors=frozenset(touched),
                writes=frozenset(self._storages[key] for key in watch.written if key in self._storages),
                hidden=frozenset(hidden),
                region=self._region(),
                cost=watch.cost,
                answer=(tuple(leaves), structure),
            )
        )
        self._recent = {*uses, *defines, *changes}
        self._fresh = {value for value in defines if not self._tensors[value].requires_grad}
        watch.start()
        return answer

    def _run(
        self, module: nn.Module | None, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, bool]:
        """The answer of a call, and whether it took a rehearsal on zeros to get it."""
        try:
            with self._fakes.mode if len(self._calls) in self._forced else nullcontext():
                answer = run(*args, **kwargs)
            rehearsed = False
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            if self.searching and module is None and self._stack:
                raise CannotOpenError(
                    f"module {self._stack[-1]!r} picks by values ({error})", self._stack[-1]
                ) from error
            rehearsal = rehearse(run, module, args, kwargs, self._fakes, self._samples)
            answer, rehearsed = rehearsal.answer, True
            if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(answer)) and module is None:
                raise  # a question about values that only one stage will have
            self.watch.rename(rehearsal.originals)
        new = {type(leaf) for leaf in pytree.tree_leaves(answer) if is_dataclass(leaf) and not isinstance(leaf, type)}
        for kind in new:
            # From now on torch looks for tensors in its fields.
            pytree.register_dataclass(kind)
        return answer, rehearsed

    def _update_gradients(self) -> None:
        """Note which values need gradients now, looking at those of the last call: custom autograd functions and changes
        in place decide that after a call."""
        last = len(self._calls) - 1
        for number in self._recent:
            value, needed = self._values[number], self._tensors[number].requires_grad
            value.late |= needed and number in self._fresh
            if not value.gradients or value.gradients[-1][1] != needed:
                value.gradients.append((last, needed))

    def _refuse_unseen(self) -> None:
        """Between two calls nothing may have happened to a stand-in."""
        if self.watch.made_fake:
            place = f"module {self._stack[-1]!r}" if self._stack else "the model's own forward function"
            raise CannotOpenError(
                f"{place} computes with something that is neither a module nor a torch function, such as "
                "autograd.Function.apply, which a pipeline cannot follow there; call it inside a module of its own",
                self._stack[-1] if self._stack else "",
            )
        self.watch.start()

    def _touched(self, name: str, module: nn.Module | None, arguments: list[Tensor]) -> set[str]:
        """Names of the parameters and buffers that the call just made can or did touch."""
        touched = {self._names[id(leaf)] for leaf in arguments if id(leaf) in self._names}
        if module is not None:
            # Parameters that were not used this time may be the next time.
            touched |= {self._names[id(tensor)] for tensor in (*module.parameters(), *module.buffers())}
        seen = self.watch.read | self.watch.written
        return touched | {self._storages[key] for key in seen if key in self._storages}

    def _hidden(self, arguments: list[Tensor]) -> set[int]:
        """Earlier calls whose results the call just made reads without having been given them."""
        given = {storage_key(leaf) for leaf in arguments if id(leaf) in self._numbers}
        return {self._maker[key] for key in (self.watch.read | self.watch.written) - given if key in self._maker}

    def _unknown(self, tensor: Tensor) -> bool:
        """Whether it has values that no recorded call made: another axis computes some from whole inputs."""
        key = storage_key(tensor)
        return not (is_stand_in(tensor) or key in self._local or key in self._storages)

    def _region(self) -> int:
        """Which region of recomputation the forward pass is in, 0 for none; each catches what autograd saves."""
        hooks: tuple[Any, ...] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
        if not hooks:
            return 0
        if hooks not in self._regions:
            self._regions.append(hooks)
        return self._regions.index(hooks) + 1

    def _changes(self, written: set[int]) -> tuple[int, ...]:
        """Values changed in place by one stage; what every stage computes itself cannot be changed by one alone."""
        for key in written & set(self._local):
            self._force(self._local[key][1])
        return tuple(number for number, value in enumerate(self._values) if value.storage in written)

    def _define(self, number: int, tensors: list[Tensor]) -> tuple[int, ...]:
        first = len(self._values)
        for tensor in tensors:
            if id(tensor) in self._numbers or id(tensor) in self._names:
                continue  # handed back unchanged
            if not is_stand_in(tensor):
                self._force(number)
            self._numbers[id(tensor)] = len(self._values)
            self._values.append(Value(tensor, storage_key(tensor)))
            self._tensors.append(tensor)
        return tuple(range(first, len(self._values)))

    def _force(self, number: int) -> None:
        if number in self._forced:
            place = self._calls[number].name if number < len(self._calls) else "the call under way"
            raise CannotOpenError(
                f"a pipeline cannot follow what {place} does to its tensors in place; write the result to a new tensor, "
                "or use a plan without pipeline",
                self._stack[-1] if self._stack else "",
            )
        self._forced.add(number)
        raise _Again

    # The end

    def finish(self, inputs: Any, output: Any) -> Trace:
        """The trace, with stand-ins that hold no autograd graph."""
        self._update_gradients()
        ghosts: dict[int, Tensor] = {}
        for tensor, value in zip(self._tensors, self._values, strict=True):
            value.ghost = tensor.detach().requires_grad_(tensor.requires_grad)
            ghosts[id(tensor)] = value.ghost
        calls = []
        for call in self._calls:
            leaves = () if call.everywhere else tuple(self._answer_leaf(leaf, ghosts) for leaf in call.answer[0])
            calls.append(replace(call, answer=(leaves, call.answer[1])))
        kinds = {type(leaf) for leaf in pytree.tree_leaves(output) if is_dataclass(leaf)}
        for kind in kinds:
            pytree.register_dataclass(kind)
        output_leaves = pytree.tree_leaves(output)
        numbers = tuple(self._numbers[id(leaf)] for leaf in output_leaves if id(leaf) in self._numbers)
        if not numbers:
            raise PlanError(
                "the model's output holds no tensor that depends on its parameters (tensors are found in tuples, lists, "
                "dicts, data classes and what is registered with torch.utils._pytree): return a tensor or such a container"
            )
        written = any(leaf._version > 0 for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        return Trace(
            calls=tuple(calls),
            values=tuple(self._values),
            entries=tuple(self._entries.items()),
            output=numbers,
            numbers={id(value.ghost): number for number, value in enumerate(self._values)},
            copy_inputs=written,
            asks_values=self._asks_values,
        )

    def _answer_leaf(self, leaf: Any, ghosts: dict[int, Tensor]) -> Any:
        return Own(self._names[id(leaf)]) if id(leaf) in self._names else ghosts.get(id(leaf), leaf)

    def refuse_values(self, error: Exception) -> NoReturn:
        """Raise the reason why a forward pass that reads values cannot be cut."""
        place = f" in module {self._stack[-1]!r}" if self._stack else ""
        raise PlanError(
            f"the model's forward function looks at the values of an activation{place} ({error}); the stages of a pipeline "
            "must know the shapes of all activations beforehand. Use tensor operations instead of .item(), bool() or "
            "masks that select a varying number of elements, or use a plan without pipeline"
        ) from error


def _name(function: Any) -> str:
    return str(resolve_name(function) or getattr(function, "__name__", repr(function)))
