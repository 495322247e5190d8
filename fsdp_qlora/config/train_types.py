"""The table of train types: which codec stores the frozen base, and which adapter trains over it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainType:
    """A codec of frozen weights and a kind of adapter, both by name."""

    codec: str
    adapter: str

    @property
    def is_nf4(self) -> bool:
        return self.codec == "nf4"


TRAIN_TYPES: dict[str, TrainType] = {
    "qlora": TrainType(codec="nf4", adapter="lora"),
    "lora": TrainType(codec="plain", adapter="lora"),
    "hqq_lora": TrainType(codec="hqq", adapter="lora"),
    "bnb_dora": TrainType(codec="nf4", adapter="dora"),
    "hqq_dora": TrainType(codec="hqq", adapter="dora"),
    "dora": TrainType(codec="plain", adapter="dora"),
}
