"""The loss scale of float16, which halves where gradients overflow and doubles where they have not for long."""

from collections.abc import Mapping

GROWTH_STEPS = 2000  # finite steps after which the loss scale doubles, as torch.amp.GradScaler's default


class LossScale:
    """The factor that keeps float16 gradients from underflowing; 1 in every other precision."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self._finite_steps = 0

    def shrink(self) -> None:
        self.value, self._finite_steps = self.value / 2, 0

    def grow(self) -> None:
        self._finite_steps += self.enabled
        if self._finite_steps == GROWTH_STEPS:
            self.value, self._finite_steps = self.value * 2, 0

    def state(self) -> dict[str, float]:
        return {"value": self.value, "finite_steps": self._finite_steps}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.value, self._finite_steps = state["value"], int(state["finite_steps"])
