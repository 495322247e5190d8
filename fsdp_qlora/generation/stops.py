"""The tokens at which an answer ends: those that its model names, and those of the rows' form."""

from collections.abc import Sequence

from transformers import GenerationConfig, PretrainedConfig

from fsdp_qlora.config.options import ModelOptions


def stops_of(model: ModelOptions, hf_config: PretrainedConfig, others: Sequence[int]) -> list[int]:
    """Return the tokens of the base's generation config, of its config, and `others`: EOS and a turn's end."""
    try:
        said = GenerationConfig.from_pretrained(model.model_name, revision=model.revision).eos_token_id
    except (OSError, ValueError):  # a model need not have one
        said = None
    found: list[int] = []
    for one in (said, getattr(hf_config, "eos_token_id", None), list(others)):
        found += one if isinstance(one, list) else [] if one is None else [int(one)]
    return list(dict.fromkeys(found))
