"""What `train`, `prove` and `bench` can execute of a plan, as far as the plan alone tells; the model may forbid more.

A plan may say more than that: one for a cluster with other software is written down in full, and refused here.
"""

from collections.abc import Iterator

from shardwise.errors import PlanError
from shardwise.spec.plan import HALVED, TRAINED_PRECISIONS, V_SHAPED, Plan
from shardwise.spec.schedule import stages_for


def check_plan(plan: Plan) -> None:
    """Refuse settings that cannot run or would have no effect: none is ignored.

    Raises:
        PlanError: what was given, the rule, what to do.
    """
    for reason in refusals(plan):
        raise PlanError(f"plan {plan.layout}{reason}")


def refusals(plan: Plan) -> Iterator[str]:
    """Every reason why the plan cannot be executed as it is, to follow the layout in a sentence."""
    layout = plan.layout
    if plan.precision not in TRAINED_PRECISIONS:
        yield f" with precision={plan.precision!r}: shardwise trains in {' or '.join(TRAINED_PRECISIONS)}; choose one of these"
    if plan.zero_stage is not None and layout.shard == 1:
        yield f" with zero_stage={plan.zero_stage}: it belongs to a shard axis, which this layout has not; leave it out"
    elif plan.zero_stage == 1:
        yield (
            f" with zero_stage=1: shardwise's shard axis splits gradients too; write zero_stage=2, or data="
            f"{layout.data * layout.shard} in place of shard={layout.shard} to split nothing"
        )
    if plan.recompute != "none" and plan.compile:
        yield (
            f" with compile and recompute={plan.recompute!r}: compiled code decides itself what to compute again; leave one of "
            "them out"
        )
    if plan.recompute == "none" and plan.recompute_modules:
        yield ": recompute_modules names what to recompute, but recompute is 'none': give recompute as well"
    yield from _of_pipelines(plan)
    if plan.build == "deferred" and not defers_weights(plan):
        yield (
            " with build='deferred': weights are made in parts where the layout has a shard axis, alone or with "
            "data; leave build out, or use shard="
        )
    if layout.tensor == 1 and plan.tensor_rules:
        yield ": tensor_rules belong to a tensor axis, which this layout has not; leave them out"


def _of_pipelines(plan: Plan) -> Iterator[str]:
    layout = plan.layout
    others = layout.shard * layout.tensor * layout.context * layout.expert
    if plan.schedule in HALVED and (others > 1 or plan.recompute != "none"):
        yield (
            f" with schedule={plan.schedule!r}: its backward passes are in two halves, through which neither shard, "
            f"tensor, context, expert nor recompute go; use schedule={unhalved(plan)!r}, or data beside the pipeline"
        )
    given = plan.cuts or plan.stage_layers or plan.virtual_stages is not None
    if layout.pipeline == 1:
        if given or plan.schedule != Plan().schedule:
            yield (
                ": schedule, virtual_stages, cuts and stage_layers belong to a pipeline, which this layout has not; leave them "
                "out"
            )
        return
    if plan.virtual_stages is not None and plan.schedule != "interleaved1f1b":
        yield (
            f" with schedule={plan.schedule!r} and virtual_stages={plan.virtual_stages}: only interleaved1f1b has any number of "
            "stages a worker; use it, or leave virtual_stages out"
        )
    if 0 in plan.stage_layers:
        yield " with stage_layers of 0: a stage needs a layer to start with; move one there, or name cuts"
    if plan.cuts and plan.stage_layers:
        yield " with cuts and stage_layers: both say where the model is cut; leave one of them out"
    elif plan.stage_layers and plan.schedule in (*V_SHAPED, "interleaved1f1b"):
        yield from _wrong_stages(plan, len(plan.stage_layers))
    elif plan.stage_layers and len(plan.stage_layers) != layout.pipeline:
        yield f" with {len(plan.stage_layers)} stage_layers: give one number for each of the {layout.pipeline} stages"


def _wrong_stages(plan: Plan, given: int) -> Iterator[str]:
    try:
        stages = stages_for(plan.schedule, plan.layout.pipeline, plan.stage_layers[1:], plan.virtual_stages)
    except PlanError as error:
        yield f": {error}"
        return
    if stages != given:
        yield f" with {given} stage_layers: give one number for each of the {stages} stages of schedule={plan.schedule!r}"


def defers_weights(plan: Plan) -> bool:
    """Whether large weights are made in parts, each when it is sharded, unless the model does not allow that.

    The other axes need whole weights: to try the model out, to cut single weights, to deal experts out.
    """
    layout = plan.layout
    return plan.build != "whole" and layout.shard > 1 and layout.data * layout.shard == layout.workers


def unhalved(plan: Plan) -> str:
    """The schedule nearest to a halved one."""
    return "interleaved1f1b" if plan.schedule in V_SHAPED else "1f1b"
