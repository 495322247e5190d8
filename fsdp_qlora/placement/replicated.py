"""The placement of a base that fits each card: whole on every rank."""

from torch import Tensor

from fsdp_qlora.models.causal_lm import CausalModel, Unit
from fsdp_qlora.placement.base import Slot
from fsdp_qlora.placement.resident import Residents, keep_whole
from fsdp_qlora.plan.plan import Plan


class Replicated:
    """The whole base on every rank's device: no traffic in a step."""

    def prepare(self, model: CausalModel) -> None:
        self._residents = Residents([unit for unit in model.units if unit.name in model.blocks])

    def store(self, unit: Unit, whole: Tensor) -> None:
        if unit.name in self._residents.names:
            self._residents.store(unit, whole)
        else:
            keep_whole(unit, whole)

    def slot(self, unit: Unit) -> Slot | None:
        return None

    def finish(self) -> None:
        pass

    def promised_bytes(self, unit: Unit) -> int:
        return unit.frozen.layout.nbytes

    def shrink(self, plan: Plan) -> None:
        pass
