"""The plan for a rig that is not here: the model is made on the meta device, its ranks and cards are told, not asked.

What comes out is the start-up table of `--plan_only true`, headed and closed by lines that say that it is expected and
was not measured.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from fsdp_qlora.config.cards import Card, Rig, rig_of
from fsdp_qlora.config.options import Config, MemoryOptions
from fsdp_qlora.distributed.shards import shard_count
from fsdp_qlora.distributed.world import World
from fsdp_qlora.errors import RunEnded, UserError
from fsdp_qlora.exchange.choose import check_exchange
from fsdp_qlora.kernels.attention import Masking, possible
from fsdp_qlora.models.assemble import assemble
from fsdp_qlora.models.attention import Attention, Chooser, choose_attention
from fsdp_qlora.models.causal_lm import CausalModel
from fsdp_qlora.models.fitting import fit, has_its_own_head
from fsdp_qlora.models.fused.fuse import Fusion, fuse
from fsdp_qlora.models.precision import MODES, Precision, needs_bf16
from fsdp_qlora.models.skeleton import build, check_context, check_layers_stay, quantization_of, read_config
from fsdp_qlora.optim.optimizers import state_bytes
from fsdp_qlora.plan.budget import HOST_SHARE
from fsdp_qlora.plan.expected import expected_rates, link_rate
from fsdp_qlora.plan.inputs import Facts, facts_of
from fsdp_qlora.plan.plan import Budget
from fsdp_qlora.plan.planning import Planned, fastest_of, leaving, micro_batches, sending
from fsdp_qlora.plan.rates import Rates
from fsdp_qlora.report.machine import rates_line
from fsdp_qlora.report.startup import describe
from fsdp_qlora.runtime.determinism import deterministic_algorithms
from fsdp_qlora.runtime.launcher import read_launch
from fsdp_qlora.session import make_recipe
from fsdp_qlora.training.evaluations import memory_of
from fsdp_qlora.units import GIB
from fsdp_qlora.weights.choose import open_weights, random_weights, told_forms
from fsdp_qlora.weights.codecs import is_quantized, weight_of
from fsdp_qlora.weights.source import Weights

META = torch.device("meta")
# Before Ampere, as `precision_of` tells the user.
WITHOUT_BF16: Literal["fp16_autocast"] = "fp16_autocast"
# Of a card, beside what PyTorch gives out: contexts, cuDNN, cuBLAS, NCCL, tables of page-locked memory. nvidia-smi
# counts 23.42 GiB of a process in which PyTorch has 22.17 (70B with 92 GiB of host memory, two H200s, torch 2.11).
OUTSIDE_GIB = 1.25
HOST_GIB = 64  # of the machine, where nothing is said: what a desktop with two such cards has at least
SYSTEM_GIB = 4  # of it, that the system has for itself


@dataclass(frozen=True)
class RigWorld(World):
    """The ranks of a rig, told by one process: all have what it has, and nobody is met."""

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        return [[float(n) for n in numbers]] * self.size

    def barrier(self) -> None:
        pass

    def _agree(self, error: RunEnded | None) -> None:
        if error is not None:
            raise error


def plan_for_rig(config: Config, notes: Sequence[str] = ()) -> int:
    """Print the plan of `--plan_for`'s rig. Returns the exit code.

    Raises UserError where the options do not go with that rig, or nothing fits it."""
    rig = check_rig(config)
    hf_config = read_config(config.model.model_name, config.model.revision)
    check_context(config.data.context_length, hf_config)
    check_layers_stay(hf_config)
    with deterministic_algorithms(config.training.deterministic):
        lines = [*notes, *rig_lines(config, rig, hf_config)]
    for line in lines:
        print(line, flush=True)
    return 0


def check_rig(config: Config) -> Rig:
    """The rig that is asked for. Raises UserError where the launch or other options contradict it."""
    assert config.memory.plan_for is not None
    rig, place, memory = rig_of(config.memory.plan_for), read_launch(), config.memory
    if place.size > 1:
        raise UserError(
            f"plan_for: {memory.plan_for}: one process plans for all its ranks, and {place.size} were started; start "
            "with `python train.py`, without torchrun"
        ).on_every_rank(place.rank)
    if config.launch.world_size not in (-1, rig.count):
        raise UserError(
            f"world_size: {config.launch.world_size}, but plan_for {memory.plan_for} has {rig.count} ranks, one a "
            "card; omit world_size, or change one of them"
        )
    if memory.gpu_memory_gib is not None and memory.gpu_memory_gib > rig.card.gib:
        raise UserError(
            f"gpu_memory_gib: {memory.gpu_memory_gib:g} is more than the card of plan_for {memory.plan_for} has "
            f"({rig.card.gib:.1f} GiB); omit it or lower it"
        )
    return rig


def rig_lines(config: Config, rig: Rig, hf_config: PretrainedConfig) -> list[str]:
    """The start-up table, headed and closed by what it is."""
    said: list[str] = []
    if needs_bf16(config.model.precision) and not rig.card.has_bf16:
        said = [
            f"          a {rig.card.name} has no bfloat16, and train.py refuses --precision {config.model.precision} "
            f"there: planned for --precision {WITHOUT_BF16}"
        ]
        config = replace(config, model=replace(config.model, precision=WITHOUT_BF16))
    built = build_for(config, rig, hf_config)
    planned = plan_built(built, config, rig)
    described = describe(built.model, hf_config, config, built.attention, built.fusion, world_of(rig))
    rates = [rates_line(planned.record["rates"], "not measured: ")] if config.output.verbose else []
    return [*head_lines(config.memory, rig), *said, *described, *planned.lines, *rates, closing_line(rig)]


def head_lines(memory: MemoryOptions, rig: Rig) -> list[str]:
    """What the rig is taken to be."""
    card, host = rig.card, budget_of(memory, rig).host_bytes / GIB
    machine = "" if memory.host_memory_gib is not None else f" (a machine of {HOST_GIB} GiB; --host_memory_gib)"
    lanes = "" if memory.link_gbps is not None else f" (PCI Express {card.pcie}.0 x16; --link_gbps, half for 8 lanes)"
    reach = "" if rig.count == 1 else ", with peer access" if card.peers else ", without peer access"
    return [
        f"rig       EXPECTED, NOT MEASURED: {rig}, by published rates and what measured cards reach of theirs",
        f"          GPU {card_gib(memory, card):.1f} GiB, {OUTSIDE_GIB:g} of them for CUDA and its libraries; on "
        f"paper {card.paper:,.0f} TFLOP/s, {card.memory:,.0f} GB/s{reach}",
        f"          host memory {host:.1f} GiB for the plan{machine}; link {link_of(memory, card) / 1e9:.1f} GB/s to "
        f"each card, all at once{lanes}",
    ]


def closing_line(rig: Rig) -> str:
    """The same where the table ends, which is what is seen first of a long one."""
    return f"          all of this is expected of {rig}, none of it measured: on the rig `--plan_only true` measures"


@dataclass(frozen=True)
class Built:
    """A model without weights, as the ranks of a rig would have it, and what came of fusing it."""

    model: CausalModel
    fusion: Fusion
    attention: Attention


def build_for(config: Config, rig: Rig, hf_config: PretrainedConfig) -> Built:
    """The model on the meta device. Raises UserError where an option cannot be on that rig."""
    world, card, precision = world_of(rig), rig.card, MODES[config.model.precision]
    shard_count(config.memory, world)
    check_exchange(config.memory, world)
    attention = attention_there(config.model.attention, hf_config, precision, card)
    skeleton = build(hf_config, precision, attention.name)
    fitted = fit(skeleton, weights_of(config, hf_config, precision))
    own_head = has_its_own_head(skeleton, fitted)
    told = told_forms(quantization_of(hf_config), fitted, precision.compute)
    recipe = make_recipe(config, hf_config, fitted, precision, own_head, world, told)
    passes = partial(fuse, micro_batches(config)[0], META, choose=chooser(card))
    model, fusion = assemble(skeleton, recipe, config.adapter, passes)
    return Built(model, fusion, attention)


def plan_built(built: Built, config: Config, rig: Rig) -> Planned:
    """Raises UserError where nothing fits."""
    world, card, memory = world_of(rig), rig.card, config.memory
    optimizer = state_bytes(config.training.optimizer, world.device.type)
    by_host = rig.count > 1 and (memory.exchange_by == "host" or (memory.exchange_by == "auto" and not card.peers))

    def known(sized: Config) -> tuple[Facts, Rates | None]:
        there = facts_of(built.model, sized, world, built.fusion, optimizer, card.capability)
        there = replace(there, exchange_by_host=by_host)
        if config.training.deterministic:
            there = replace(there, multiprocessors=card.multiprocessors)
        facts = sending(there)
        return facts, expected_rates(card, facts, link_of(memory, card), card.peers)

    try:
        answers = memory_of(config, None)(built.model)
        return leaving(answers, budget_of(memory, rig), lambda left: fastest_of(config, left, world, known))
    except UserError as error:
        raise UserError(
            f"plan_for {memory.plan_for}, expected at --precision {config.model.precision}: {error}"
        ) from None


def world_of(rig: Rig) -> RigWorld:
    return RigWorld(0, rig.count, 0, rig.count, torch.device("cuda", 0))


def card_gib(memory: MemoryOptions, card: Card) -> float:
    return card.gib if memory.gpu_memory_gib is None else memory.gpu_memory_gib


def link_of(memory: MemoryOptions, card: Card) -> float:
    """Bytes per second."""
    return link_rate(card) if memory.link_gbps is None else memory.link_gbps * 1e9


def budget_of(memory: MemoryOptions, rig: Rig) -> Budget:
    """What the plan may use of the rig."""
    host = host_share(HOST_GIB) if memory.host_memory_gib is None else memory.host_memory_gib
    given, outside = int(card_gib(memory, rig.card) * GIB), int(OUTSIDE_GIB * GIB)
    return Budget(given - outside, int(host * GIB), outside)


def host_share(gib: float) -> float:
    """GiB that the plan may give away of a machine with `gib`, as `find_budget` takes them of a machine at rest."""
    return HOST_SHARE * (gib - SYSTEM_GIB)


def attention_there(wanted: str, hf_config: PretrainedConfig, precision: Precision, card: Card) -> Attention:
    """The attention of blocks that are not fused, and of a model that is built here without flash-attn."""
    if wanted != "flash_attention_2":
        chosen = choose_attention(wanted, hf_config, precision, torch.device("cpu"))
        return chosen if wanted != "auto" else replace(chosen, reason="flash-attn is not counted on there")
    if not card.has_bf16 or precision.compute is torch.float32:
        raise UserError(
            f"attention: flash_attention_2 needs 16-bit compute on a card from Ampere on; a {card.name} at this "
            "precision takes --attention auto or sdpa"
        )
    return Attention("sdpa", "flash_attention_2, as asked")


def chooser(card: Card) -> Chooser:
    """The backend that the card is taken to find fastest: cuDNN on data-centre cards from Hopper on (measured there),
    elsewhere FlashAttention-2, which PyTorch has from Ampere on; else plain float32."""

    def choose(
        device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int, int], masking: Masking
    ) -> str:
        able = possible(torch.device("cuda"), dtype, shape[1], shape[4], masking) if card.has_bf16 else []
        order = ("cudnn", "flash") if (9, 0) <= card.capability < (12, 0) else ("flash", "cudnn")
        return next((name for name in order if name in able), "math")

    return choose


def weights_of(config: Config, hf_config: PretrainedConfig, precision: Precision) -> Weights:
    """Names of a quantized checkpoint tell which linears are; of any other the config is enough.

    A folder is asked for its names in any case: hqq's own checkpoints have nothing in their config."""
    options = config.model
    if options.dummy_weights:
        return random_weights(precision.stream)
    if quantization_of(hf_config) is not None:
        return open_weights(options, precision.stream)
    if Path(options.model_name).is_dir():
        with suppress(UserError):  # of a model that is not here yet there may be a config alone
            found = open_weights(options, precision.stream)
            names = found.names() or set()
            if any(is_quantized(weight_of(name), names) for name in names):
                return found
    return random_weights(precision.stream)
