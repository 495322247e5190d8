"""`HostExchange` without a GPU: the host writes the counters and waits for them. The same protocol, no streams."""

import ctypes
import time
from contextlib import nullcontext

from fsdp_qlora.exchange.base import Pending
from fsdp_qlora.exchange.host import HostExchange


class Done:
    def wait(self) -> None:
        pass

    def is_completed(self) -> bool:
        return True


class OnHost(HostExchange):
    def _open(self) -> None:
        pass

    def _begin(self) -> None:
        self.count += 1

    def _on_stream(self) -> nullcontext[None]:
        return nullcontext()

    def _pending(self) -> Pending:
        return Done()

    def _take_out(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    _bring = _take_out

    def _await(self, counter: int, value: int) -> None:
        while int(self._counters[counter]) < value:
            time.sleep(1e-4)

    def _advance(self, counter: int) -> None:
        self._counters[counter] = self.count
