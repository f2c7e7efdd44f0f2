"""A plan for people."""

from __future__ import annotations

from mpdit_kernels.command import aligned

from mpdit.planning.account import account
from mpdit.planning.memory import MEMORY_ERROR, Memory
from mpdit.planning.network import volume
from mpdit.planning.planner import Plan, Scale


def text(name: str, plan: Plan) -> str:
    """All of it, most wanted first."""
    request = plan.request
    nodes = request.fabric.nodes(request.gpus)
    title = (
        f"{name} on {request.gpus} x {request.gpu.name}{f' in {nodes} nodes' if nodes > 1 else ''}, ZeRO stage "
        f"{request.zero}, {request.precision}{', checkpointing' if request.checkpointing else ''}: global batch "
        f"{request.global_batch} = {request.gpus} GPUs x {plan.micro_batch} images x {plan.accumulation} micro steps"
    )
    sections = [
        title,
        aligned(_answers(plan)),
        _memory(plan),
        _time(plan),
        _volumes(plan),
        _scaling(plan),
        _words(plan),
    ]
    return "\n\n".join(sections)


def _answers(plan: Plan) -> list[tuple[str, str]]:
    request, error = plan.request, plan.share.error
    need, limit = plan.memory.total, request.gpu.memory
    verdict = "yes" if plan.fits else "no"
    if plan.fits and need * (1 + MEMORY_ERROR) > limit:
        verdict = "narrowly"
    whole, again = plan.largest
    low, high = plan.hours * (1 - error), plan.hours * (1 + error)
    answers = [
        ("does it fit?", f"{verdict}: {_gib(need)} of {_gib(limit)} GiB a GPU"),
        ("largest micro-batch", f"{whole} images, {again} with checkpointing"),
        ("step", f"{_ms(plan.step_seconds)} ms, of which {_ms(plan.communication.exposed)} ms waiting for the network"),
        ("speed", f"{plan.images_per_second:,.0f} images/s, {plan.mfu:.0%} of the datasheet's FLOP/s (MFU)"),
        (
            "the run",
            f"{plan.hours:,.1f} hours ({low:,.1f} to {high:,.1f}) for {request.epochs:g} epochs of {request.images:,} "
            f"images, {plan.steps:,} steps, {plan.hours * request.gpus:,.0f} GPU hours",
        ),
    ]
    if not plan.fits:
        answers.insert(1, ("to make it fit", _advice(plan)))
    return answers


def _advice(plan: Plan) -> str:
    whole, again = plan.largest
    if whole:
        return f"more micro steps: at most {whole} images each"
    return f"--checkpointing, and at most {again} images a micro step"


def _memory(plan: Plan) -> str:
    columns = (plan.memory_whole, plan.memory_checkpointing)
    rows: list[tuple[str, ...]] = [("GiB a GPU", "worst moment", "with checkpointing", "each at its most, as asked")]
    rows += [
        (name, *(_gib(vars(column)[name]) for column in columns), _gib(plan.memory_parts[name]))
        for name in Memory.__dataclass_fields__
    ]
    rows.append(("total", *(_gib(column.total) for column in columns), ""))
    return aligned(rows)


def _time(plan: Plan) -> str:
    rows = [("ms a step", "", "share")]
    parts = [*vars(plan.time).items(), ("communication left over", plan.communication.exposed)]
    rows += [(name, _ms(value), f"{value / plan.step_seconds:.0%}") for name, value in parts if value]
    return aligned(rows)


def _volumes(plan: Plan) -> str:
    request = plan.request
    fabric = request.fabric
    parameters = account(plan.config).params_trainable
    within = min(request.gpus, fabric.gpus_per_node)
    across = request.gpus if request.gpus > fabric.gpus_per_node else fabric.gpus_per_node * 2
    rows: list[tuple[str, ...]] = [
        ("a GPU sends, a step", "gradients", "weights", f"in a node, {within} GPUs", f"across nodes, {across} GPUs")
    ]
    for zero in range(4):
        gradients, weights = volume(zero, request.gpus, parameters, plan.accumulation)
        row = [f"ZeRO {zero}{' (chosen)' if zero == request.zero else ''}", f"{gradients / 1e9:.2f} GB"]
        row.append(f"{weights / 1e9:.2f} GB")
        for gpus in (within, across):
            sent = sum(volume(zero, gpus, parameters, plan.accumulation))
            row.append(f"{_ms(fabric.seconds(sent, gpus, 0))} ms")
        rows.append(tuple(row))
    return aligned(rows)


def _scaling(plan: Plan) -> str:
    head = ("GPUs", "same batch a GPU: images/s", "of perfect", "same global batch: images/s", "of perfect")
    strong = {row.gpus: row for row in plan.scaling["global_batch"]}
    weak = plan.scaling["images_per_gpu"]
    return aligned([head, *((str(row.gpus), *_scale(row), *_scale(strong.get(row.gpus))) for row in weak)])


def _scale(row: Scale | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return f"{row.images_per_second:,.0f}{'' if row.fits else ', too large'}", f"{row.efficiency:.0%}"


def _words(plan: Plan) -> str:
    kind = "measured" if plan.share.measured else "not measured"
    return (
        f"Times are {kind}: {plan.share.source}. A step may differ by {plan.share.error:.0%}; memory by "
        f"{MEMORY_ERROR:.0%}. Peaks: {plan.request.gpu.source}."
    )


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"
