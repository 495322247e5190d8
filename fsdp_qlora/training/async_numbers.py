"""Copy of a few numbers from the GPU to the host, behind what computes them."""

import torch
from torch import Tensor


class AsyncNumbers:
    """Numbers that reach the host once the GPU has computed them."""

    def __init__(self, numbers: Tensor) -> None:
        """Queue the copy on the current stream."""
        self._numbers, self._arrived = numbers, None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.current_stream(numbers.device).record_event()

    def wait(self) -> list[list[float]]:
        """Return the numbers once the copy is done.

        Waits on an event: a copy to pageable memory would hold a lock of the driver while it waits, and would block the
        thread that saves the adapter when a peer is gone."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
