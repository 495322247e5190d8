"""The bytes that adapters' gradients and their update move through the GPU's memory: arithmetic, for they lie outside
of what `costs.py` traces."""

from fsdp_qlora.plan.inputs import FLOAT, Facts


def gradient_bytes(facts: Facts) -> float:
    """Return the bytes of a block's gradients on their way to this rank's sums: gathered, reduced, added."""
    return facts.adapter_parameters * (2 * facts.compute_bytes + 2 * facts.reduce_bytes + 2 * FLOAT)


def update_bytes(facts: Facts) -> float:
    """Return the bytes of norm, clipping, update and new working copies of this rank's adapters."""
    owned = facts.all_adapters / facts.ranks
    halves = 2 * facts.master_bytes + facts.compute_bytes + FLOAT if facts.master_bytes < FLOAT else 0  # (un)joined
    return owned * (
        FLOAT + 2 * FLOAT + 3 * FLOAT + 2 * facts.optimizer_state_bytes + FLOAT + facts.compute_bytes + halves
    )
