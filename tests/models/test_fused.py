"""The fused decoder block is Hugging Face's layer: exact in float64, in other dtypes no worse than plain PyTorch.

Every family, every keep level, adapters on all linears and on some, biases, dropout, windows, softcaps, odd sizes.
"""

import dataclasses
import statistics
import sys

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN

from fsdp_qlora.config.keep import Keep
from fsdp_qlora.config.options import AdapterOptions
from fsdp_qlora.errors import UserError
from fsdp_qlora.kernels.attention import Masking, possible
from fsdp_qlora.kernels.lora_wide import PITCH, wide
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fused.block import FusedBlock
from fsdp_qlora.models.fused.fuse import HalfTables
from fsdp_qlora.models.fused.scratch import PaddedGradient
from fsdp_qlora.models.precision import Precision
from fsdp_qlora.weights.codecs import NF4, Plain
from tests.kernels.test_kernel_attention import flash_attn_package
from tests.models.test_families import FAMILIES, config_of
from tests.support.fusable import Results, Subject, inputs, subject
from tests.support.tiers import some_slow
from tests.support.truth import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if DEVICE.type == "cuda" else [])
ALL = AdapterOptions(lora_rank=4, lora_alpha=6.0)
SOME = AdapterOptions(lora_rank=3, lora_alpha=5.0, use_rslora=True, lora_target_modules=["v_proj", "o_proj", "up_proj"])
ONE = AdapterOptions(lora_rank=8, lora_target_modules=["layers.1.mlp.down_proj"])
QUERIES = AdapterOptions(lora_rank=5, lora_target_modules=["q_proj", "gate_proj"])
KEEP = [level.label for level in Keep]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}

# name -> (family, its config beyond the usual small one, adapters)
CASES: dict[str, tuple[str, dict, AdapterOptions]] = {
    name: (name, FAMILIES[name], ALL)
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3Text", "Phi3")
} | {
    "biases-exact-gelu": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}, ALL),
    "eight-groups-odd-heads": ("Llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 10}, ALL),
    "no-groups-yarn": ("Llama", {"num_key_value_heads": 4, "rope_parameters": YARN}, ALL),
    "window-in-some-layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 3} | MIXED, ALL),
    "partial-rotary": ("Phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                    "partial_rotary_factor": 0.5}}, ALL),
    "some-adapters-rslora": ("Qwen3", FAMILIES["Qwen3"], SOME),
    "some-adapters-post-norms": ("Gemma3Text", FAMILIES["Gemma3Text"], SOME),
    "queries-and-gate": ("Qwen2", {}, QUERIES),
    "one-adapter": ("Llama", {}, ONE),
}  # fmt: skip


def case(name: str, dtype: torch.dtype, device: torch.device = DEVICE, dropout: float = 0.0) -> Subject:
    """In float64 there are no codes: the linears are stored as they are."""
    family, more, adapter = CASES[name]
    adapter = AdapterOptions(**vars(adapter) | {"lora_dropout": dropout})
    codec = Plain(dtype) if dtype == torch.float64 else NF4(double_quant=name != "Mistral")
    return subject(config_of(family, more), dtype, device, codec, adapter)


def assert_good(ours: Results, plain: Results, truth: Results) -> None:
    """The error of each result at most twice plain PyTorch's, of all together at most 1.3 times (measured: 0.8 in 16
    bits, 1.1 in float32). In the mean square: the largest of dozens of tensors' largest errors is luck."""
    assert ours.keys() == plain.keys() == truth.keys()
    ratios = []
    for name, true in truth.items():
        assert ours[name].dtype == plain[name].dtype, name
        size = true.norm()
        wrong, theirs = ((results[name].double() - true).norm() for results in (ours, plain))
        ratios.append((wrong / theirs).item())
        assert wrong < 0.5 * size, f"{name}: error {wrong:.2e} of {size:.2e}"
        assert ratios[-1] < 2, f"{name}: error {wrong:.2e}, plain PyTorch's {theirs:.2e}"
    assert statistics.geometric_mean(ratios) < 1.3, ratios


def assert_same_bits(ours: Results, theirs: Results, what: str) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), f"{what}: {name} differs by {(ours[name] - value).abs().max():.1e}"


@pytest.mark.parametrize("shape", some_slow([(2, 21), (1, 63), (1, 1)], 2), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_float64_is_exact(name, shape):
    """No rounding to hide behind: a wrong formula shows, however small its effect. Runs the plain forms."""
    of = case(name, torch.float64, CPU)
    of.fuse()
    h, d_out = inputs(of.hf_config, shape, torch.float64, CPU)
    given = h.clone(), d_out.clone()
    ours, truth = of.run(h, d_out), of.truth(h, d_out)
    assert torch.equal(h, given[0]), "the input was written to"
    assert torch.equal(d_out, given[1]), "the output's gradient was written to"
    assert ours.keys() == truth.keys()
    for key, true in truth.items():
        largest = true.abs().max().item()
        if shape[1] > 1 or not ("q_proj" in key or "k_proj" in key):  # the score of a lone token is of no effect
            assert largest > 1e-4, f"{key} tests nothing"
        assert (ours[key] - true).abs().max() < 1e-12 * max(largest, 1.0), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", some_slow(CASES, 2))
def test_rounding_is_at_most_plain_pytorchs(name, dtype):
    of = case(name, dtype)
    of.fuse()
    # Eight rows: of two, one may be such that a rounding anywhere decides a tensor's whole error, ours or theirs.
    h, d_out = inputs(of.hf_config, (8, 21), dtype, DEVICE)
    assert_good(of.run(h, d_out), of.plain(h, d_out), of.truth(h, d_out))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests above ran them")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param("Gemma3Text", torch.float32, marks=pytest.mark.slow),
        ("Phi3", torch.float16),
        pytest.param("biases-exact-gelu", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_triton_kernels_through_the_interpreter(name, dtype, triton_device):
    of = case(name, dtype, triton_device)
    of.fuse(keep_activations="qkv")
    h, d_out = inputs(of.hf_config, (1, 7), dtype, triton_device)
    assert_good(of.run(h, d_out), of.plain(h, d_out), of.truth(h, d_out))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("keep", KEEP)
def test_every_attention_backend_in_a_block(keep, dtype):
    of = case("Qwen2", dtype)
    of.fuse(keep_activations=keep)
    h, d_out = inputs(of.hf_config, (2, 63), dtype, DEVICE)
    plain, truth = of.plain(h, d_out), of.truth(h, d_out)
    backends = possible(DEVICE, dtype, 63, 16, Masking(0.25))
    assert backends[-1] == "math"
    for backend in backends:
        of.set_backend(backend)
        assert_good(of.run(h, d_out), plain, truth)


@pytest.mark.parametrize("name", ["Qwen2", "Gemma2"])
def test_the_flash_attn_package_in_a_block(name, monkeypatch):
    """Its backward takes what its forward has kept, so a block must keep all of it or compute all of it again."""
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_package())
    of = case(name, torch.float64, CPU)
    h, d_out = inputs(of.hf_config, (2, 21), torch.float64, CPU)
    truth = of.truth(h, d_out)
    for keep in KEEP:
        of.fuse(keep_activations=keep)
        of.set_backend("flash_attn")
        for key, ours in of.run(h, d_out).items():
            assert (ours - truth[key]).abs().max() < 1e-12 * max(truth[key].abs().max(), 1.0), (keep, key)


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("name", some_slow(CASES, 3))
def test_every_keep_level_gives_the_same_bits(name, dropout):
    """What is computed again is what was computed: the same kernels on the same numbers, the same dropout."""
    dtype = torch.float32 if dropout else torch.bfloat16
    of = case(name, dtype, dropout=dropout)
    h, d_out = inputs(of.hf_config, (2, 21), dtype, DEVICE)
    results = {}
    for keep in KEEP:
        of.fuse(keep_activations=keep)
        if DEVICE.type == "cuda":  # not all fused backends give the same bits twice
            of.set_backend("math")
        torch.manual_seed(5)
        results[keep] = of.run(h, d_out)
    for keep in KEEP[:-1]:
        assert_same_bits(results[keep], results["all"], keep)


def test_without_checkpointing_everything_is_kept():
    of = case("Llama", torch.float32)

    def kept(**options: object) -> set[str]:
        of.fuse(**options)
        return {block.fused.keep.label for block in of.model.blocks.values()}

    assert kept(use_gradient_checkpointing=False) == {"all"}
    assert kept(keep_activations="halves") == {"halves"}
    assert kept() == {"input"}


# ---- what a block holds between its passes


def held_by(*things: object) -> dict[int, int]:
    """Address -> bytes of every storage that these keep alive, through all they hold but the block's weights."""
    found: dict[int, int] = {}
    todo, seen = list(things), set()
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, list | tuple):
            todo += thing
        elif isinstance(thing, dict):
            todo += thing.values()
        elif dataclasses.is_dataclass(thing) and not isinstance(thing, FusedBlock):
            todo += vars(thing).values()
    return found


def kept_numbers(of: Subject, keep: str, shape: tuple[int, int]) -> float:
    """Numbers per token that one block keeps, tables left out."""
    of.fuse(keep_activations=keep)
    of.set_backend("math")
    block = list(of.model.blocks.values())[-1]  # the first may copy its input
    h, _ = inputs(of.hf_config, shape, torch.float32, DEVICE)
    tables = of.model.backbone.rotary_emb(h, torch.arange(shape[1], device=DEVICE)[None])
    out = block(h.requires_grad_(), position_embeddings=tables)
    held = held_by(out.grad_fn.saved_tensors, vars(out.grad_fn))
    for table in tables[:2]:  # cos and sin
        del held[table.untyped_storage().data_ptr()]
    assert h.untyped_storage().data_ptr() in held
    return sum(held.values()) / 4 / h.shape[:2].numel()


@pytest.mark.parametrize("name", ["Llama", "Phi3", "Gemma2"])
def test_a_block_keeps_what_its_level_says_and_no_more(name):
    of = case(name, torch.float32)
    c = of.hf_config
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    steps = {
        "input": c.hidden_size * (1 + (name == "Gemma2")),  # with down's output, which its norm reads
        "halves": c.hidden_size,
        "attention": c.num_attention_heads * (head_dim + 1),  # its output and row sums
        "qkv": (c.num_attention_heads + 2 * c.num_key_value_heads) * head_dim,
        "all": 2 * c.intermediate_size,
    }
    adapters = 7 * 8  # x A^T of each adapter, of rank 4, which may be padded
    promised = 0
    for keep in KEEP:
        promised += steps[keep]
        spare = adapters + PITCH * (keep == "all")  # rows of gate and up are padded to whole cache lines
        assert promised <= kept_numbers(of, keep, (2, 32)) <= promised + spare, keep


@pytest.mark.parametrize("offload", [False, True], ids=["on-the-device", "in-host-memory"])
@pytest.mark.parametrize("keep", ["input", "all"])
def test_backward_lets_go_of_everything_and_runs_once(keep, offload):
    of = case("Qwen3", torch.float32)
    of.fuse(keep_activations=keep, use_activation_cpu_offload=offload)
    h, d_out = inputs(of.hf_config, (2, 21), torch.float32, DEVICE)
    out = of.forward(h.requires_grad_())
    assert sum(held_by(vars(out.grad_fn)).values()) >= h.untyped_storage().nbytes()
    out.backward(d_out, retain_graph=True)
    left = held_by(vars(out.grad_fn))
    assert sum(left.values()) <= 2 * 21 * of.hf_config.head_dim * 4, "more than the tables outlives backward"
    with pytest.raises(AssertionError, match="backward once"):
        out.backward(d_out)


@pytest.mark.parametrize("keep", ["input", "attention", "all"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Phi3"])
def test_what_waits_in_host_memory_comes_back_with_the_same_bits(name, keep):
    of = case(name, torch.float32)
    h, d_out = inputs(of.hf_config, (2, 21), torch.float32, DEVICE)
    of.fuse(keep_activations=keep)
    wanted = of.run(h, d_out)
    of.fuse(keep_activations=keep, use_activation_cpu_offload=True)
    for step in range(3):  # buffers are used again
        assert_same_bits(of.run(h, d_out), wanted, f"step {step}")
        with torch.no_grad():  # leaves nothing behind that the next backward would take for its own
            assert torch.equal(of.forward(h), wanted["out"])
    offload = next(iter(of.model.blocks.values())).fused.offload
    assert not held_by(offload._offloaded)


def test_without_gradients_nothing_is_kept_and_the_output_is_the_same():
    of = case("Gemma2", torch.float32)
    of.fuse(keep_activations="all")
    h, _ = inputs(of.hf_config, (2, 21), torch.float32, DEVICE)
    trained = of.forward(h.requires_grad_())
    with torch.no_grad():
        seen = of.forward(h)
    assert seen.grad_fn is None
    assert torch.equal(seen, trained)


def test_autocast_around_a_block_changes_nothing():
    """bf16_buffers_autocast runs under autocast: forward must compute as backward, outside of it, computes again."""
    of = case("Gemma2", torch.bfloat16)
    of.fuse()
    h, d_out = inputs(of.hf_config, (2, 21), torch.bfloat16, DEVICE)
    wanted = of.run(h, d_out)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert_same_bits(of.run(h, d_out), wanted, "autocast")


# ---- dropout


def test_dropouts_gradient_is_that_of_the_mask_that_forward_drew():
    """By central differences along a random direction in float64, of the input and all adapters at once."""
    of = case("Llama", torch.float64, CPU, dropout=0.4)
    of.fuse()
    h, d_out = inputs(of.hf_config, (2, 21), torch.float64, CPU)

    def along(step: float) -> float:
        with torch.no_grad():
            for p, direction in zip(of.adapters.values(), directions[1:], strict=True):
                p += step * direction
            torch.manual_seed(9)
            value = (of.forward(h + step * directions[0]) * d_out).sum().item()
            for p, direction in zip(of.adapters.values(), directions[1:], strict=True):
                p -= step * direction
        return value

    directions = [torch.randn_like(x) for x in (h, *of.adapters.values())]
    torch.manual_seed(9)
    results = of.run(h, d_out)
    grads = [results["d_h"], *(results[name] for name in of.adapters)]
    slope = sum((g * d).sum().item() for g, d in zip(grads, directions, strict=True))
    measured = (along(1e-5) - along(-1e-5)) / 2e-5
    assert abs(slope) > 1
    assert abs(measured - slope) < 1e-6 * abs(slope)
    torch.manual_seed(10)
    assert not torch.allclose(of.run(h, d_out)["d_h"], results["d_h"]), "another seed, the same mask"


def test_dropout_is_right_on_average_and_off_in_evaluation():
    """Of down alone a block's output is linear, so its mean over masks is the output without dropout."""
    adapter = AdapterOptions(lora_rank=4, lora_target_modules=["layers.0.mlp.down_proj"], lora_dropout=0.5)
    of = subject(config_of("Llama", {"num_hidden_layers": 1}), torch.float32, DEVICE, adapter=adapter)
    of.fuse()
    h, _ = inputs(of.hf_config, (1, 8), torch.float32, DEVICE)
    with torch.no_grad():
        draws = torch.stack([of.forward(h) for _ in range(120)]).double()
        of.model.eval()
        without = of.forward(h)
        assert torch.equal(without, of.forward(h))
    deviation = (draws.mean(0) - without) / (draws.std(0) / 120**0.5)  # standard normal, if the mean is right
    assert 0.8 < deviation.square().mean().sqrt() < 1.2


# ---- what is fused, and what is not


def reason(of: Subject, **options: object) -> str:
    """Why `auto` does not fuse it; `true` must say the same as an error, and nothing is as for fused blocks."""
    fusion = of.fuse(**options)
    assert fusion.blocks == 0
    assert str(fusion) == f"not fused: {fusion.reason}"
    assert all(block.fused is None for block in of.model.blocks.values())
    assert not isinstance(of.model.backbone.rotary_emb, HalfTables)
    with pytest.raises(UserError, match="fused: true is not possible") as error:
        of.fuse(**options | {"fused": "true"})
    assert fusion.reason in str(error.value)
    assert "\n" not in str(error.value)
    return fusion.reason


def test_an_unknown_family_is_named():
    of = subject(config_of("Phi", FAMILIES["Phi"]), torch.float32, CPU)
    assert "PhiDecoderLayer" in reason(of)


@pytest.mark.parametrize(
    ("family", "more", "word"),
    [
        ("Llama", {"hidden_act": "relu"}, "ReLU"),
        ("Llama", {"hidden_act": "quick_gelu"}, "QuickGELU"),
        ("Llama", {"attention_dropout": 0.1}, "dropout"),
        ("Phi3", {"resid_pdrop": 0.1}, "dropout"),
    ],
)
def test_what_a_layer_does_beyond_the_kernels_is_named(family, more, word):
    assert word in reason(subject(config_of(family, more), torch.float32, CPU))


def test_host_memory_for_activations_needs_fused_blocks():
    of = subject(config_of("Phi", FAMILIES["Phi"]), torch.float32, CPU)
    with pytest.raises(UserError, match=r"use_activation_cpu_offload: .*PhiDecoderLayer"):
        of.fuse(use_activation_cpu_offload=True)


@pytest.mark.parametrize("keep", KEEP)
def test_a_keep_level_needs_fused_blocks(keep):
    of = subject(config_of("Phi", FAMILIES["Phi"]), torch.float32, CPU)
    with pytest.raises(UserError, match=rf"keep_activations: {keep} .*PhiDecoderLayer"):
        of.fuse(keep_activations=keep)
    assert of.fuse(keep_activations="auto").blocks == 0


def test_options_that_stand_in_the_way_are_named():
    of = subject(config_of("Llama", {}), torch.float32, CPU)
    assert "eager" in reason(of, attention="eager")
    assert of.fuse(fused="false").reason == "as asked"
    of = subject(config_of("Llama", {}), torch.float32, CPU, precision=Precision(torch.float32, torch.bfloat16))
    assert "float32" in reason(of, precision="bf16_autocast")


def test_what_is_fused_is_told():
    of = case("Phi3", torch.float32, CPU)
    assert str(of.fuse(fused="true")) == "3 blocks and 12 projections fused, attention by math"


KERNEL_OF = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


@pytest.mark.parametrize("name", KERNEL_OF)
def test_the_activation_is_the_one_that_the_layer_has(name):

    def change(layer: torch.nn.Module) -> None:
        layer.mlp.act_fn = ACT2FN[name]  # whatever the config calls it: versions differ in which field they read

    of = subject(config_of("Gemma", FAMILIES["Gemma"] | {"hidden_act": "silu"}), torch.float32, CPU, change=change)
    of.fuse(fused="true")
    assert {block.fused.spec.mlp.activation for block in of.model.blocks.values()} == {KERNEL_OF[name]}


@pytest.mark.parametrize(("name", "asks"), [("Llama", False), ("one-adapter", True)])
def test_the_first_block_makes_a_gradient_of_its_input_only_where_it_does_not_train(name, asks):
    """ "one-adapter" is one of the second block: nothing else would ask for a backward."""
    of = case(name, torch.float32)
    of.fuse()
    of.model.embedding[0].frozen.flat = torch.nn.Parameter(
        torch.zeros(of.model.embedding[0].frozen.layout.nbytes // 4, device=DEVICE), requires_grad=False
    )
    hidden = of.model.embedding[0](torch.zeros(1, 3, dtype=torch.int64, device=DEVICE))
    assert hidden.requires_grad == asks


def test_room_beside_a_gradient_is_taken_only_with_that_gradient():
    gradient = PaddedGradient()
    d_wide = wide(6, 24 + 8, torch.empty(0))
    gradient.hand(d_wide)
    taken = gradient.take(d_wide[:, :24], 32)
    assert taken is not None
    assert taken.data_ptr() == d_wide.data_ptr()
    assert gradient.take(d_wide[:, :24], 32) is None, "it was taken already"
    for other, columns in (
        (torch.zeros(6, 24), 32),
        (d_wide[1:, :24], 32),
        (d_wide[:4, :24], 32),
        (d_wide[:, :24], 40),
    ):
        gradient.hand(d_wide)
        assert gradient.take(other, columns) is None
    bare = torch.zeros(6, 24)
    assert gradient.take(bare, 24) is bare, "without an adapter there is nothing to leave room for"
    row = wide(1, 24 + 8, torch.empty(0))
    gradient.hand(row)
    assert gradient.take(row[:, :24].reshape(1, 1, 24).reshape(-1, 24).as_strided((1, 24), (24, 1)), 32) is not None


def test_tables_of_angles_stay_float32():
    of = case("Llama", torch.bfloat16, CPU)
    of.fuse()
    positions = torch.arange(50)[None]
    tables = of.model.backbone.rotary_emb(torch.zeros(1, 50, 64, dtype=torch.bfloat16), positions)
    whole = of.model.backbone.rotary_emb.inner(torch.zeros(1, 50, 64), positions)
    for half, full in zip(tables[:2], whole, strict=True):
        assert half.dtype == torch.float32
        assert torch.equal(torch.cat([half, half], dim=1), full[0])


def test_a_block_is_called_as_hugging_face_calls_its_layers():
    """Nothing else of the model changes: the family's own forward, from token ids, meets the fused blocks."""
    of = case("Gemma3Text", torch.float32, CPU)
    of.model.rest.bind()
    ids = torch.randint(3, 259, (2, 30))
    with torch.no_grad():
        before = of.model.backbone(input_ids=ids, use_cache=False)[0]
        of.fuse()
        of.model.rest.bind()
        after = of.model.backbone(input_ids=ids, use_cache=False)[0]
    assert isinstance(of.model, CausalModel)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    assert not torch.equal(after, before)
