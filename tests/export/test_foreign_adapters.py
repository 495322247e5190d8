"""Adapters of other programs that are more than two matrices over an unchanged base are refused."""

import pytest
from peft import LoraConfig

from fsdp_qlora.adapters.lora import LoRA
from fsdp_qlora.errors import UserError


def settings(**changed: object) -> dict[str, object]:
    return LoraConfig(r=4, lora_alpha=8).to_dict() | {"peft_type": "LORA"} | changed


@pytest.mark.parametrize("first", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_first_values_that_leave_the_base_as_it_is(first):
    options = LoRA().from_peft_config(settings(init_lora_weights=first))
    assert options is not None
    assert (options.lora_rank, options.lora_alpha) == (4, 8)


@pytest.mark.parametrize(
    "changed",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"alora_invocation_tokens": [1, 2]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"use_qalora": True},
        {"use_bdlora": {"nblocks": 2}},
        {"kasa_config": {"beta": 1.0}},
        {"lora_ga_config": {"direction": "ArB2r"}},
        {"arrow_config": {"top_k": 2}},
        {"monteclora_config": {}},
        {"velora_config": {}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_what_changes_the_base_or_the_sum_is_refused(changed):
    (name,) = changed
    with pytest.raises(UserError, match=f"adapter: it has {name} .*merge it with PEFT"):
        LoRA().from_peft_config(settings(**changed))
