"""Answers are, token by token, those of transformers' `generate` on PEFT and bitsandbytes, in greedy float32."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from fsdp_qlora.generation import decoder as decoder_file
from fsdp_qlora.generation.answers import Answers
from fsdp_qlora.generation.decoder import FusedDecoder, GenericDecoder, make_decoder
from fsdp_qlora.generation.sampling import Sampling
from tests.models.test_families import FAMILIES, GENERIC, config_of
from tests.support import plain, tiny
from tests.support.built import Built, built
from tests.support.runs import Options
from tests.support.tiers import some_slow

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (23, 5, 40, 1, 17)  # of prompts, in tokens; windows have 16
NEW = 12
STOPS = [2]


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(3, 259, (length,), generator=draw).tolist() for length in LENGTHS]


def theirs_of(folder: Path, adapted: bool = True, dora: bool = False) -> PeftModel:
    """transformers + PEFT + bitsandbytes' numbers, with adapters that matter."""
    recipe = plain.Recipe(dora=dora)
    model = plain.with_adapters(plain.load_base(folder, recipe, attention="eager"), recipe)
    draw = torch.Generator().manual_seed(0)
    for path, p in model.named_parameters():
        if "lora_B" in path:
            torch.nn.init.normal_(p, std=0.1 if adapted else 0.0, generator=draw)
    return model.eval()


def tokens_of(model: PeftModel, asked: Sequence[list[int]], stops: Sequence[int] = STOPS) -> list[list[int]]:
    """Greedy answers, one row at a time, without the stop token."""
    said = []
    for ids in asked:
        row = torch.tensor([ids])
        out = model.generate(
            input_ids=row, attention_mask=torch.ones_like(row), max_new_tokens=NEW, do_sample=False,
            eos_token_id=list(stops), pad_token_id=0,
        )[0, len(ids) :].tolist()  # fmt: skip
        said.append(out[: next((i for i, token in enumerate(out) if token in stops), len(out))])
    return said


def options(folder: Path, **more: object) -> Options:
    given: Options = {"model_name": folder, "dataset": "dummy", "lora_rank": 8, "precision": "fp32"}
    return given | {"context_length": 64} | more


def load_theirs(ours: Built, theirs: PeftModel) -> None:
    values = dict(theirs.named_parameters())
    names = [name for group in ours.adapters.groups for name in group.names]
    ours.adapters.load({name: values[f"base_model.model.{name}.default.weight"].detach() for name in names})


def ours_of(ours: Built, asked: Sequence[list[int]], rows: int = 4, stops: Sequence[int] = STOPS) -> list[list[int]]:
    capacity = max(map(len, asked)) + NEW
    ours.model.eval()
    decoder = make_decoder(ours.model, rows, capacity, ours.world.device)
    assert isinstance(decoder, FusedDecoder if ours.fusion.blocks else GenericDecoder)
    rounds = Answers(decoder, Sampling(), stops, NEW, ours.world)(asked)
    found = [answer for answers in rounds for answer in answers]
    assert [answer.row for answer in found] == list(range(len(asked)))
    return [answer.ids for answer in found]


@pytest.fixture(scope="module", params=some_slow(FAMILIES, 3))
def family(request, tmp_path_factory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, tiny.save_model(config_of(request.param, FAMILIES[request.param]), folder)


@pytest.mark.parametrize("fused", ["auto", pytest.param("false", marks=pytest.mark.slow)])
def test_tokens_are_those_of_transformers_on_peft_and_bitsandbytes(family, fused):
    name, folder = family
    theirs = theirs_of(folder)
    wanted = tokens_of(theirs, prompts())
    assert len({tuple(tokens) for tokens in wanted}) == len(LENGTHS), "answers that are all alike compare nothing"
    with built(options(folder, fused=fused)) as ours:
        assert bool(ours.fusion.blocks) == (fused == "auto" and name not in GENERIC)
        load_theirs(ours, theirs)
        assert ours_of(ours, prompts()) == wanted


@pytest.mark.parametrize("fused", some_slow(["auto", "false"], 2))
def test_tokens_of_dora_are_those_of_transformers_on_peft(fused, tmp_path):
    """Qwen2 has biases, which no magnitude scales."""
    folder = tiny.save_model(config_of("Qwen2", FAMILIES["Qwen2"]), tmp_path)
    theirs = theirs_of(folder, dora=True)
    draw = torch.Generator().manual_seed(2)
    for path, p in theirs.named_parameters():
        if "lora_magnitude_vector" in path:
            p.data.mul_(0.7 + 0.6 * torch.rand(p.shape, generator=draw))
    wanted = tokens_of(theirs, prompts())
    assert len({tuple(tokens) for tokens in wanted}) == len(LENGTHS), "answers that are all alike compare nothing"
    with built(options(folder, fused=fused, train_type="bnb_dora")) as ours:
        load_theirs(ours, theirs)
        assert ours_of(ours, prompts()) == wanted


SWITCH = 20  # tokens beyond which longrope has its other table
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 50 for i in range(8)],
    "long_factor": [2.0 + i / 4 for i in range(8)], "original_max_position_embeddings": SWITCH,
}  # fmt: skip


@pytest.fixture(scope="module")
def longrope(tmp_path_factory) -> Path:
    shape = {"rope_parameters": LONGROPE, "original_max_position_embeddings": SWITCH, "sliding_window": None}
    return tiny.save_model(config_of("Phi3", shape), tmp_path_factory.mktemp("longrope"))


@pytest.mark.parametrize("fused", some_slow(["auto", "false"], 2))
def test_a_row_that_grows_beyond_the_switch_of_longrope_begins_anew_as_in_transformers(fused, longrope):
    asked = [(prompts()[0] * 2)[:length] for length in (SWITCH - 3, SWITCH - 1, SWITCH, SWITCH + 1, 1)]
    theirs = theirs_of(longrope)
    with built(options(longrope, fused=fused)) as ours:
        load_theirs(ours, theirs)
        assert ours_of(ours, asked, rows=1) == tokens_of(theirs, asked)


def test_prompts_of_several_passes_have_the_table_of_the_longest(longrope, monkeypatch):
    theirs = theirs_of(longrope)
    with built(options(longrope)) as ours:
        load_theirs(ours, theirs)
        whole = ours_of(ours, prompts(), rows=len(LENGTHS))
        monkeypatch.setattr(decoder_file, "PROMPT_TOKENS", 8)
        assert ours_of(ours, prompts(), rows=len(LENGTHS)) == whole
        assert ours_of(ours, prompts(), rows=1) != whole, "the table matters"
