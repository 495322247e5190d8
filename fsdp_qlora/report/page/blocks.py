"""Where the run had what: a sentence for each choice of the plan, and a picture with a column for each block."""

from collections import Counter
from collections.abc import Sequence

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.report.page.files import Missing
from fsdp_qlora.report.page.html import Html, join, paragraph, section, table, text
from fsdp_qlora.report.page.plan import Block, Plan
from fsdp_qlora.report.page.svg import legend
from fsdp_qlora.units import count_of

# By the plan's name, {place}: GPU or rank.
PLACEMENTS = {
    "replicate": "the frozen base is on every {place}, every block resident",
    "shard": "each {place} has its share of the frozen base, and blocks are gathered ahead of use",
    "stream": "the frozen base is in host memory once per node, and blocks are copied ahead of use",
    "shard_offload": "each rank has its share of the frozen base in host memory, and blocks are gathered ahead of use",
}
STREAMED = "stream"  # the placement whose blocks are resident or not one by one
SAVED = {  # by keep level: what a block saves for backward
    "input": "its input",
    "halves": "its input and its MLP's input",
    "attention": "these and attention's output",
    "qkv": "these and queries, keys and values",
    "all": "these, gate and up",
}


def blocks_section(plan: Plan | Missing) -> Html:
    """Return what was where, in words and as a picture."""
    title = "What was where"
    if isinstance(plan, Missing):
        return section("placement", title, paragraph(plan.why))
    rows = [(text(name), text(said)) for name, said in _words(plan)]
    return section("placement", title, table(title, ("what", "where, or how many"), rows), *_strips(plan))


def _words(plan: Plan) -> list[tuple[str, str]]:
    place = "GPU" if plan.on_gpus else "rank"
    known = PLACEMENTS.get(plan.placement)
    found = [("placement", plan.placement + (f": {known.format(place=place)}" if known else ""))]
    if plan.placement == STREAMED:
        resident = sum(block.resident for block in plan.blocks)
        found.append(("resident blocks", f"{resident} of {len(plan.blocks)}, the others streamed from host memory"))
        head = "resident on the GPU" if plan.head_resident else "streamed"
        found.append(("head", head if plan.has_head else "the embedding's table, resident on the GPU"))
        found.append(("staging buffers", str(plan.staging)))
    found.append(("saved for backward", _kept(plan)))
    offloaded = sum(block.offloaded for block in plan.blocks)
    if plan.is_fused:
        waits = f"what {offloaded} of {len(plan.blocks)} blocks save waits in host memory"
        found.append(("offloaded", waits if offloaded else "nothing that is saved for backward"))
    rows = f"{plan.micro_batch} x {plan.accumulation} x {plan.ranks}"
    product = plan.micro_batch * plan.accumulation * plan.ranks
    found.append(("rows of a step", f"{product}: micro-batch x accumulation x ranks = {rows}"))
    return found


def _kept(plan: Plan) -> str:
    if not plan.is_fused:
        if plan.remat:
            return "every block saves its input; the rest is computed again (activation checkpointing)"
        return "every block saves all that autograd keeps"
    counts = Counter(block.keep for block in plan.blocks)
    several = [f"{count_of(n, 'block')} {keep} ({SAVED.get(keep, 'not known')})" for keep, n in counts.most_common()]
    return "; ".join(several)


def _strips(plan: Plan) -> list[Html]:
    """Return a strip for each thing that blocks may differ in."""
    if not plan.blocks:
        return []
    homes = [_home(block, plan) for block in plan.blocks]
    strips = [("Frozen weights of each block, first to last", homes)]
    if plan.is_fused:
        strips.append(("Saved for backward", [(_level(block), block.keep) for block in plan.blocks]))
        if any(block.offloaded for block in plan.blocks):
            strips.append(("Saved activations", [_waits(block) for block in plan.blocks]))
    return [_strip(name, cells) for name, cells in strips]


def _home(block: Block, plan: Plan) -> tuple[str, str]:
    if plan.placement == STREAMED:
        return ("here", "resident on the GPU") if block.resident else ("away", "streamed from host memory")
    if plan.placement == "shard":
        return "shared", "divided among the ranks"
    if plan.placement == "shard_offload":
        return "away", "divided among the ranks, in host memory"
    return "here", "resident on every GPU" if plan.on_gpus else "resident on every rank"


def _waits(block: Block) -> tuple[str, str]:
    return ("away", "in host memory") if block.offloaded else ("here", "in GPU memory")


def _level(block: Block) -> str:
    labels = [level.label for level in Keep]
    return f"keep-{labels.index(block.keep)}" if block.keep in labels else "shared"


def _strip(name: str, cells: Sequence[tuple[str, str]]) -> Html:
    """Return a row of cells, one for each block. cells: (class of the color, what it stands for)."""
    width = 1 / len(cells)
    drawn = "".join(
        f'<rect class="cell {kind}" x="{i * width:.3%}" width="{width:.3%}" y="0" height="20">'
        f"<title>{text(f'block {i}: {said}')}</title></rect>"
        for i, (kind, said) in enumerate(cells)
    )
    counts = Counter(cells)
    known = [(kind, f"{said}: {count_of(n, 'block')}") for (kind, said), n in counts.items()]
    said = f"{name}: {', '.join(one for _, one in known)}"
    return join(
        [
            Html(f'<figure class="strip"><figcaption>{text(name)}</figcaption>'),
            Html(f'<svg role="img" aria-label="{text(said)}" width="100%" height="20">{drawn}</svg>'),
            legend(known),
            Html("</figure>"),
        ]
    )
