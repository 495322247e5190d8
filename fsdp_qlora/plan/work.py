"""The work of a fused block, the head and the optimizer: FLOPs, bytes through the GPU's memory, kernels launched.

Counted as `models/fused/block.py` and the kernels do it, per micro-batch of one rank. N * D queries, K * D keys,
I intermediate.
"""

from dataclasses import dataclass, replace

from fsdp_qlora.kernels.cross_entropy import chunk_tokens
from fsdp_qlora.kernels.glu_lora import MOST_RANK
from fsdp_qlora.plan.inputs import FLOAT, KEEP, Facts

# Kernels that the host launches for a Llama block, forward, and backward at each keep level, counted by running it on
# the meta device (tests/plan/test_plan_time.py). What else the host does is in
# the seconds a launch is measured to take.
LAUNCHES_FORWARD = 21
LAUNCHES_BACKWARD = (47, 38, 38, 35, 33)
MIDDLE_BANDWIDTH = 0.75  # of copy bandwidth that a middle's backward reaches with its adapters' gradients (glu_lora.py)


@dataclass(frozen=True)
class Work:
    """FLOPs by the rate they run at (products forward, products backward, attention, adapters' skinny products),
    bytes by theirs (elementwise, decoding weights, skinny products), launches."""

    forward: float = 0.0
    backward: float = 0.0
    attend: float = 0.0
    attend_backward: float = 0.0
    skinny: float = 0.0
    bytes: float = 0.0
    decoded: float = 0.0
    skinny_bytes: float = 0.0
    launches: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))


def _values(work: Work) -> tuple[float, ...]:
    return (work.forward, work.backward, work.attend, work.attend_backward, work.skinny, work.bytes, work.decoded,
            work.skinny_bytes, work.launches)  # fmt: skip


def b_rides(facts: Facts) -> bool:
    """Whether gate's and up's B's stand beside their weights in the product of their input's gradient (as
    `lora_wide.pays_beside` has it)."""
    return bool(facts.rank_gate_up) and facts.inner > facts.hidden and not facts.dropout


def in_one_pass(facts: Facts) -> bool:
    """Whether the backward of an MLP's middle gives its adapters' gradients as well (`lora_wide.fits_glu`)."""
    beside = facts.rank_gate_up or facts.rank_down
    return not facts.dropout and bool(beside) and facts.rank <= MOST_RANK


class BlockWork:
    """A block's passes. Every product is 2 * T * numbers of its weight; an adapter rides along as more columns."""

    def __init__(self, facts: Facts) -> None:
        f = self.f = facts
        weights = {
            "qkv": f.qkv * f.hidden,
            "o": f.hidden * f.queries,
            "gate_up": 2 * f.inner * f.hidden,
            "down": f.hidden * f.inner,
        }
        rank = {"qkv": f.rank_qkv, "o": f.rank_o, "gate_up": f.rank_gate_up, "down": f.rank_down}
        self.inputs = {"qkv": f.hidden, "o": f.queries, "gate_up": f.hidden, "down": f.inner}
        self.outputs = {"qkv": f.qkv, "o": f.hidden, "gate_up": 2 * f.inner, "down": f.hidden}
        self.rank = rank
        scale = f.linear_numbers / sum(weights.values())  # 1 but where a family's block is not of these products
        self.weights = {name: numbers * scale for name, numbers in weights.items()}

    def forward(self) -> Work:
        f, n = self.f, self.f.tokens * self.f.compute_bytes
        work = Work(launches=LAUNCHES_FORWARD)
        for name in self.weights:
            work += self._product(name)
        passes = 2 * f.hidden + 2 * (f.queries + f.pairs) + 4 * f.hidden + 3 * f.inner + f.hidden
        passes += 4 * f.hidden if f.norms_after else 0
        passes += 2 * (f.queries + f.pairs) if f.head_norms else 0
        return work + self._attention() + Work(bytes=n * passes)

    def again(self, level: int) -> Work:
        """What backward computes a second time; weights that it uses for that and for their gradients are decoded once,
        which counts there."""
        f, n = self.f, self.f.tokens * self.f.compute_bytes
        rope = n * 2 * (f.queries + f.pairs) * (2 if f.head_norms else 1)
        work = Work(bytes=n * 4 * f.hidden)  # both norms, always
        if level < KEEP.index("all"):
            work += replace(self._product("gate_up"), decoded=0.0)
        if level < KEEP.index("qkv"):
            qkv = self._product("qkv")
            work += (qkv if level < KEEP.index("halves") else replace(qkv, decoded=0.0)) + Work(bytes=rope)
        if level < KEEP.index("attention") or f.attention_again:
            work += self._attention()
        if level < KEEP.index("halves"):
            work += self._product("o") + Work(bytes=n * 3 * f.hidden)
        return work

    def backward(self, level: int) -> Work:
        f, n = self.f, self.f.tokens * self.f.compute_bytes
        work = self.again(level) + Work(
            attend_backward=2.5 * self._attention_flops(), launches=LAUNCHES_BACKWARD[level]
        )
        for name in self.weights:
            work += self._gradient(name)
        middle = f.inner * (5 / MIDDLE_BANDWIDTH if in_one_pass(f) else 6)
        passes = 2 * f.hidden + 2 * f.pairs + middle + 2 * (f.queries + f.pairs) + 8 * f.hidden
        passes += 6 * f.hidden if f.norms_after else 0
        passes += 5 * (f.queries + f.pairs) if f.head_norms else 0
        gradients = f.adapter_parameters * (2 * f.compute_bytes + 2 * f.reduce_bytes + 2 * FLOAT)
        return work + Work(bytes=n * passes + gradients)

    def _product(self, name: str) -> Work:
        f, rank, out = self.f, self.rank[name], self.outputs[name]
        apart = name == "o"  # its adapter is a product of its own, over the output
        flops = 2 * f.tokens * (self.weights[name] + (0 if apart else rank * out))
        read = self.inputs[name] + (2 * out if apart else 0) if rank else 0
        return Work(
            forward=flops,
            skinny=2 * f.tokens * rank * (self.inputs[name] + (out if apart else 0)),
            skinny_bytes=f.tokens * f.compute_bytes * read,
            decoded=self._decoded(name),
        )

    def _gradient(self, name: str) -> Work:
        f, rank, wide, out = self.f, self.rank[name], self.inputs[name], self.outputs[name]
        # The A's ride along, or the B's do where that reads less, and what goes through the A's is added after.
        rides = name == "gate_up" and b_rides(f)
        apart = rides or bool(f.dropout)
        flops = 2 * f.tokens * (self.weights[name] + rank * (out if rides else 0 if apart else wide))
        share = 1 / {"qkv": f.qkv_linears, "gate_up": f.gate_up_linears}.get(name, 1)  # d_b's are of an output's own
        d_b = not (name == "gate_up" and in_one_pass(f))  # else the middle's backward gives them
        d_a = not (name == "down" and in_one_pass(f))
        read = (not rides) * out + d_b * out + d_a * wide + apart * 2 * wide if rank else 0
        columns = (not rides) * out + d_b * share * out + d_a * wide + apart * wide
        return Work(
            backward=flops,
            skinny=2 * f.tokens * rank * columns,
            skinny_bytes=f.tokens * f.compute_bytes * read,
            decoded=self._decoded(name),
        )

    def _decoded(self, name: str) -> float:
        """Bytes read and written to decode a weight once."""
        f, share = self.f, self.weights[name] / self.f.linear_numbers
        return share * f.block_bytes + self.weights[name] * f.compute_bytes

    def _attention_flops(self) -> float:
        """Of a forward: two products of queries with the keys each one sees (FlashAttention, arXiv 2205.14135)."""
        return 4 * self.f.tokens * self.f.keys * self.f.queries

    def _attention(self) -> Work:
        return Work(attend=self._attention_flops())


def head_work(facts: Facts) -> Work:
    """Logits, their gradient, the final norm (Hugging Face's in float32, where blocks are not fused); every token is a
    label."""
    f = facts
    numbers = f.tokens * f.hidden
    product = 2 * numbers * f.vocabulary
    loss = 3 * f.tokens * f.vocabulary * f.compute_bytes  # logits are read twice and written once
    # Passes of forward, of backward, and to labelled rows and back.
    norm = numbers * ((2 + 3) * f.compute_bytes if f.fused else (8 + 15) * FLOAT) + numbers * 6 * f.compute_bytes
    chunks = -(-f.tokens // chunk_tokens(f.vocabulary))
    return Work(forward=product, backward=product, bytes=loss + norm, launches=(15 if f.fused else 60) + 8 * chunks)


def update_bytes(facts: Facts) -> float:
    """Through the GPU's memory for norm, clipping, update and new working copies of this rank's adapters."""
    owned = facts.all_adapters / facts.ranks
    halves = 2 * facts.master_bytes + facts.compute_bytes + FLOAT if facts.master_bytes < FLOAT else 0  # (un)joined
    return owned * (FLOAT + 2 * FLOAT + 3 * FLOAT + 2 * facts.state_bytes + FLOAT + facts.compute_bytes + halves)
