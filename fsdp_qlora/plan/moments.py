"""The tensors alive at each moment that may be the peak, counted as `fused.py`, the head and loading make them.

T tokens, H hidden, N * D queries, K * D keys, I intermediate, R ranks beside an input, L labels, V vocabulary.
"""

from dataclasses import dataclass

from fsdp_qlora.plan.facts import Facts, beside, pitch

KEEP = ("input", "halves", "attention", "qkv", "all")  # as `fused.KEEP`, which takes torch to import
FLOAT = 4  # bytes of float32
ROUND = 512  # bytes: what the caching allocator rounds a tensor up to
CHUNK_LOGITS, CHUNK_TOKENS = 1 << 27, 2048  # that the loss holds at a time (`cross_entropy.chunk_tokens`)
MOST_RANK = 64  # of adapters whose gradients the middle's backward sums up (`glu_lora.py`)
PIECE = 512  # queries at a time in math attention (`attention._PIECE`)
PIECES = 5  # score matrices of a piece alive at once in its backward: scores, p, d_p, d_scores, mask


@dataclass(frozen=True)
class BlockBytes:
    """Of a block on one rank. kept: on the GPU from its forward to its backward; away: in host memory meanwhile.

    forward, backward: working tensors at the worst moment of each pass, beside what is kept (backward: by this block
    too) and what is on its way from or to host memory."""

    kept: int
    away: int
    forward: int
    backward: int

    @classmethod
    def of(cls, facts: Facts, keep: str, offloaded: bool) -> "BlockBytes":
        if not facts.fused:
            return _generic(facts)
        s = _Sizes(facts)
        large, small = s.kept(KEEP.index(keep))
        forward, backward = s.forward(KEEP.index(keep)), s.backward(KEEP.index(keep))
        if not offloaded:
            return cls(small + large, 0, forward, backward)
        return cls(small, large, max(forward, s.parking(KEEP.index(keep))), backward)


def b_rides(facts: Facts) -> bool:
    """Whether gate's and up's B's stand beside their weights in the product of their input's gradient (as
    `lora_wide.pays_beside` has it)."""
    return bool(facts.rank_gate_up) and facts.inner > facts.hidden and not facts.dropout


def in_one_pass(facts: Facts) -> bool:
    """Whether the backward of an MLP's middle gives its adapters' gradients as well (`lora_wide.fits_glu`)."""
    return not facts.dropout and 0 < facts.rank <= MOST_RANK


class _Sizes:
    """Bytes of a fused block's tensors, named as there."""

    def __init__(self, facts: Facts) -> None:
        f, c = facts, facts.compute_bytes
        self.facts = f

        def rows(columns: int, itemsize: int = c) -> int:
            return -(-f.tokens * columns * itemsize // ROUND) * ROUND

        self.h = rows(f.hidden)
        self.y_wide = rows(pitch(f.hidden + beside(f.rank_qkv)))
        self.n_wide = rows(pitch(f.hidden + beside(f.rank_gate_up)))
        self.middle = rows(f.inner)
        self.middle_wide = rows(pitch(f.inner + beside(f.rank_down)))
        self.gate_up = rows(pitch(2 * f.inner + beside(f.rank_gate_up)))
        self.d_wide = rows(pitch(f.hidden + beside(f.rank_down)))
        self.d_n = self.n_wide if b_rides(f) else self.h
        self.d_h2 = rows(pitch(f.hidden + beside(f.rank_o)))
        self.qkv, self.out = rows(f.qkv), rows(f.queries)
        self.heads = rows(f.queries + f.pairs) if f.head_norms else 0  # normalised, beside the raw ones
        self.stats = rows(f.heads, FLOAT)
        # What attention gave, from which level on it is kept, and what its stats hold beside it where it is not.
        self.attended_at = len(KEEP) if f.attention_again else KEEP.index("attention")
        self.graph = self.heads if f.attention_again else 0
        self.oa, self.hs = rows(f.rank_o), rows(beside(f.rank_down))
        self.xs_qkv, self.xs_gate_up = rows(beside(f.rank_qkv)), rows(beside(f.rank_gate_up))
        self.projected = self.h if f.norms_after else 0
        self.d_h3 = self.d_wide  # the block after has left room for down's adapter
        self.d_added = self.d_wide if f.norms_after else 0
        self.gradients = f.largest_adapters * c
        self.gradients_gate_up = f.rank_gate_up * (f.hidden + 2 * f.inner // f.gate_up_linears) * c
        self.gradients_down, self.gradient_down_b = f.rank_down * (f.hidden + f.inner) * c, f.rank_down * f.hidden * c
        # Made where the MLP's middle is: d_a of down, and in one pass d_b of gate and up.
        in_one = f.rank_gate_up * 2 // f.gate_up_linears if in_one_pass(f) else 0
        self.beside_middle = f.inner * (in_one + f.rank_down) * c
        self.gradients_qkv = f.rank_qkv * (f.hidden + f.qkv // f.qkv_linears) * c
        self.attend, self.attend_backward = _attention(f)
        # An adapter's input dropped, and before that contiguous, which in backward the MLP's middle is already.
        self.dropped = 2 * rows(max(f.hidden, f.inner)) if f.dropout else 0
        self.dropped_again = self.dropped // 2

    def kept(self, level: int) -> tuple[int, int]:
        """(what may be parked in host memory, what stays) of a block at that level."""
        large, small = self.h + self.projected, self.hs
        if level >= 1:
            large, small = large + self.h + self.projected, small + self.oa
        if level >= self.attended_at:
            large, small = large + self.out, small + self.stats
        if level >= 3:
            large, small = large + self.qkv, small + self.xs_qkv
        if level >= 4:
            large, small = large + self.gate_up, small + self.xs_gate_up
        return large, small

    def attention_state(self, level: int) -> int:
        """What attention's half leaves while the MLP's runs, at that level."""
        state = self.oa + self.projected
        state += self.out + self.stats if level >= self.attended_at else 0
        return state + (self.qkv + self.xs_qkv if level >= 3 else 0)

    def attention_forward(self) -> int:
        """The worst moment of the attention half, without its input."""
        projected = self.y_wide + self.qkv + self.heads + self.out + self.stats
        return projected + max(self.attend, self.oa + self.h + self.projected, self.dropped)

    def forward(self, level: int) -> int:
        """Its input included: nobody before it keeps that."""
        mlp = self.attention_state(level) + 2 * self.h + self.n_wide + self.gate_up + self.middle_wide
        return self.h + max(self.attention_forward(), mlp + max(self.hs + self.projected, self.dropped))

    def parking(self, level: int) -> int:
        """When what is kept is made contiguous for its way to host memory: gate and up, if ranks stand beside them."""
        f = self.facts
        width = 2 * f.inner + beside(f.rank_gate_up)
        if level < KEEP.index("all") or width == pitch(width):
            return 0
        state = self.attention_state(level) + self.projected + self.hs + self.xs_gate_up
        return state + 3 * self.h + self.n_wide + self.gate_up + self.gate_up * width // pitch(width)

    def backward(self, level: int) -> int:
        """Beside what the block keeps; of that the attention half lets go of what the MLP kept, and h2."""
        again = redone = 0
        if level == 0:  # the attention half is computed again, and all of it stays
            again = self.qkv + self.out + self.stats + self.graph + self.oa + self.xs_qkv + self.h + self.projected
            redone = self.d_h3 + self.attention_forward()
        down = self.d_h3 + again + self.d_added + self.middle + self.gradient_down_b + self.dropped_again
        mlp = self.d_h3 + again + self.n_wide + (self.gate_up if level < 4 else 0)
        d_ha = self.hs if self.d_added else 0
        middle = self.middle + d_ha + self.dropped_again + self.gradient_down_b + self.beside_middle
        mlp += max(middle, self.gradients_down + self.d_n + self.gradients_gate_up)
        return max(redone, down, mlp, self._attention_backward(level))

    def _attention_backward(self, level: int) -> int:
        state = self.d_h3 + self.d_h2 + self.y_wide + self.heads + self.gradients - self.gradients_qkv
        state += self.qkv if level < 3 else 0
        state += self.out + self.stats if level < self.attended_at else 0
        state += self.oa + self.xs_qkv + self.projected + self.graph if level == 0 else 0
        let_go = self.hs + self.projected + (self.h if level > 0 else 0)
        let_go += self.gate_up + self.xs_gate_up if level == 4 else 0
        gradients = self.out + self.qkv  # d_out; d_q, d_k, d_v
        return max(0, state + gradients + max(self.attend_backward, self.dropped_again) - let_go)


def _attention(facts: Facts) -> tuple[int, int]:
    """Workspace of attention, forward and backward: float32 sums of d_q, and keys' gradients for each query head."""
    queries = facts.tokens * facts.queries
    if facts.attention in ("math", "cpu"):
        scores = facts.batch * facts.heads * min(PIECE, facts.context) * facts.context * FLOAT
        wide = (queries + 2 * facts.tokens * facts.pairs) * FLOAT
        return wide + 3 * scores + queries * FLOAT, 2 * wide + PIECES * scores + queries * FLOAT
    shared = 2 * queries * facts.compute_bytes if facts.kv_heads < facts.heads else 0
    return 0, queries * FLOAT + facts.tokens * facts.heads * FLOAT + shared


def _generic(facts: Facts) -> BlockBytes:
    """A Hugging Face layer whose linears are replaced: what autograd keeps of it, all at once where it recomputes.

    Kept numbers a token: two norms' input in float32 and output, q, k, v and their rotated copies, attention's output,
    the residual sums, gate, up, act(gate), their product, each adapter's middle."""
    f, c = facts, facts.compute_bytes
    norms = 2 * f.hidden * (FLOAT + c)
    attention = (2 * f.qkv + f.queries + 2 * f.hidden) * c + f.heads * FLOAT
    inner = 4 * f.inner * c
    ranks = (f.rank_qkv + f.rank_o + f.rank_gate_up + f.rank_down) * c
    inside = f.tokens * (norms + attention + inner + ranks)
    passing = f.tokens * (2 * f.inner + 2 * f.hidden) * c  # gradients on their way through the MLP
    h = f.tokens * f.hidden * f.stream_bytes
    if f.remat:
        return BlockBytes(h, 0, h + inside, inside + passing + f.largest_adapters * c)
    return BlockBytes(h + inside, 0, h + inside, passing + f.largest_adapters * c)


def chunk_tokens(facts: Facts) -> int:
    """Tokens whose logits the loss holds at a time."""
    return max(256, min(CHUNK_TOKENS, CHUNK_LOGITS // facts.vocabulary // 256 * 256))


def head_moments(facts: Facts) -> tuple[int, int]:
    """(loss over chunks of logits, the final norm's backward), beside what the blocks keep. Every token is a label."""
    f, c = facts, facts.compute_bytes
    numbers = f.tokens * f.hidden
    logits = min(chunk_tokens(f), f.tokens) * (-(-f.vocabulary // 16) * 16) * c
    labelled = 2 * numbers * c  # the labelled rows and their gradient
    if f.fused:  # the norm is of labelled rows, and keeps them
        return numbers * c + labelled + logits, numbers * c + labelled
    # Hugging Face's norm keeps the last block's output in float32, of which its backward makes four more.
    kept = numbers * FLOAT
    return kept + numbers * f.stream_bytes + labelled + logits, kept + 4 * FLOAT * numbers + labelled


class Loading:
    """Working bytes while a unit is encoded on a GPU: its weights as read, its bytes, the next unit's weights.

    Random weights are made on the device, a unit ahead; a checkpoint's are in host memory, one on the device at a time.
    With several ranks another's block arrives beside this rank's own. first: the embedding, before anything stays.
    block; head: when all blocks are where they stay; no block is read ahead of it."""

    def __init__(self, facts: Facts) -> None:
        f = facts
        received = 0 if f.ranks == 1 else 1
        dense = f.linear_numbers * f.stream_bytes
        largest = max(f.qkv if f.qkv_linears == 1 else f.queries, f.inner * (3 - f.gate_up_linears)) * f.hidden
        # One weight's, not yet among the unit's bytes: half a byte a number, and the scale of 64 twice in float32.
        self.parts = largest * 5 // 8 if f.codec.startswith("nf4") else 0
        self.first = (2 + received) * f.embedding_bytes + (dense if f.dummy else 0)
        weights = 2 * dense if f.dummy else largest * f.stream_bytes
        self.block = weights + self.parts + f.block_bytes * (1 + received)
        self.head = 2 * f.head_bytes
