"""Ctrl-C, SIGTERM and their kin: the first asks all ranks to stop after a step and save, a second ends the process."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import torch
import torch.distributed as dist

from fsdp_qlora.distributed.world import World
from fsdp_qlora.torch_compat import torchrun_patience

# SIGHUP: the terminal or the connection was closed. SIGUSR1: what batch systems are often told to send before they end
# a job. SIGQUIT: Ctrl-backslash.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
HURRY = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)  # a second one of these means: at once
# Batch systems signal torchrun and its ranks, and torchrun passes on what it got: that is one wish, not two.
SAME_REQUEST_SECONDS = 1.0
# Torchrun kills its ranks some time after it has passed a signal on. A rank that waits on a dead peer inside CUDA would
# vanish without a word then; it leaves a little earlier, saying why, with what it can save alone.
STUCK_SECONDS = max(5.0, torchrun_patience() - 10)
RESCUE_SECONDS = 8.0
UNWIND_SECONDS = 5.0


class Interrupt:
    """A context manager around training and saving; the loop asks `agreed()` between steps.

    A thread reads the signals' numbers from Python's wake-up descriptor, which the C-level handler writes: so the
    user is answered, and a second signal obeyed, also while the main thread is deep inside a CUDA or gloo call."""

    def __init__(self, world: World, rescue: Callable[[], str] | None = None) -> None:
        self.world, self.rescue = world, rescue
        self.signal_number: int | None = None  # that this rank got
        self.agreed_signal: int | None = None  # that the ranks stop for
        self.agreed_wish = False  # that some rank had when they last agreed
        self._polled = False
        self._busy = False  # with what takes its time
        self._hurry = False  # decided by the watcher alone, which hears of a signal when it comes
        self._raised = False  # by the handler, once: a second KeyboardInterrupt would break into the unwinding
        self._leaving = False
        self._nudging = threading.Lock()  # held to signal the main thread, which must not have left by then
        self._left = threading.Event()
        self._main_thread = threading.get_ident()

    @property
    def requested(self) -> bool:
        """Return whether this rank has been asked to stop. The ranks may learn it at different steps: see `agreed`."""
        if self.signal_number is None:
            return False
        self._polled = True
        return True

    def agreed(self, wish: bool = False) -> bool:
        """Return whether any rank has been asked to stop, the same on every rank: a collective of two host numbers.

        wish: something else that this rank has been asked for; `agreed_wish` says afterwards whether any rank has."""
        numbers = torch.tensor([(self.signal_number or 0) if self.requested else 0, wish], dtype=torch.int32)
        if self.world.size > 1:
            dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        asked, self.agreed_wish = int(numbers[0]), bool(numbers[1])
        if not asked:
            return False
        self.agreed_signal, self._polled = asked, True
        return True

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Not take this rank for stuck meanwhile: it does what takes longer than a step. Ask `agreed` behind it."""
        self._busy = True
        try:
            yield
        finally:
            self._polled = self._polled or self.signal_number is not None
            self._busy = False

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell expects after a signal: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self._stopping

    @property
    def name(self) -> str:
        """Return the name of the signal that the ranks stop for."""
        return signal.Signals(self._stopping).name

    @property
    def _stopping(self) -> int:
        return self.agreed_signal or self.signal_number or signal.SIGINT

    def __enter__(self) -> "Interrupt":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        handled = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # nohup
        self._old_handlers = {number: signal.signal(number, self._handle) for number in handled}
        self._watcher = threading.Thread(target=self._watch, daemon=True, name="signals")
        self._watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._leaving = True
        with self._nudging:
            pass
        # A system call: what was sent by now is handled here, and not by the handlers from before.
        signal.pthread_sigmask(signal.SIG_BLOCK, [])
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if kind is not None and issubclass(kind, Exception) and "TORCHELASTIC_RUN_ID" in os.environ:
            # This rank is ending. Torchrun, which has seen another one end, would cut it off before it has said why.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(self._old_wakeup)
        self._left.set()
        self._writer.close()  # the watcher reads the end of the stream and returns
        self._watcher.join()
        self._reader.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, in the main thread between any two bytecodes: so it takes no lock and prints nothing."""
        if self._hurry and not self._raised and not self._leaving:
            self._raised = True
            raise KeyboardInterrupt
        if self.signal_number is None:
            self.signal_number = number

    def _watch(self) -> None:
        first: float | None = None
        while True:
            self._reader.settimeout(None if first is None or self._polled else 0.5)
            try:
                numbers = self._reader.recv(64)
            except TimeoutError:
                if first is not None and time.monotonic() - first > STUCK_SECONDS and self._would_be_killed():
                    _write(
                        f"rank {self.world.rank}: no step ended within {STUCK_SECONDS:.0f} s of being told to stop, so "
                        "another rank has probably ended (its messages say why)"
                    )
                    self._leave(1, f"rank {self.world.rank}: left{self._rescued() or ' without saving'}")
                continue
            if not numbers:
                return
            for number in numbers:
                if number not in SIGNALS:
                    continue
                if first is None:
                    first = time.monotonic()
                    self._announce(number)
                elif number in HURRY and time.monotonic() - first > SAME_REQUEST_SECONDS:
                    if not self._hurry:  # its handler raises as soon as the main thread runs Python again
                        self._hurry = True
                        with self._nudging:
                            if not self._leaving:
                                signal.pthread_kill(self._main_thread, signal.SIGINT)
                    self._left.wait(UNWIND_SECONDS)
                    if not self._left.is_set():
                        self._leave(128 + number, f"rank {self.world.rank}: left at once, without saving")

    def _announce(self, number: int) -> None:
        if not self.world.is_main:
            return
        if number == signal.SIGINT:
            how = "Ctrl-C again to leave at once without saving"
        elif number == signal.SIGHUP:
            how = "the terminal or connection was closed"
        elif number in (signal.SIGUSR1, signal.SIGQUIT):
            how = "Ctrl-C to leave at once without saving"
        else:
            how = "torchrun also sends this when another rank has ended"
        _write(f"{signal.Signals(number).name}: stopping after this step, then saving ({how})")

    def _would_be_killed(self) -> bool:
        return not (self._polled or self._busy) and self.world.size > 1 and "TORCHELASTIC_RUN_ID" in os.environ

    def _rescued(self) -> str:
        """Return what was saved, in words. Bounded in time: a copy from a GPU that waits on a dead peer never ends."""
        said: list[str] = []

        def attempt() -> None:
            try:
                said.append(self.rescue() if self.rescue is not None else "")
            except Exception as error:
                said.append(f" without saving ({error})")

        saving = threading.Thread(target=attempt, daemon=True, name="rescue")
        saving.start()
        saving.join(RESCUE_SECONDS)
        return said[0] if said else ""

    def _leave(self, code: int, why: str) -> None:
        _write(why)
        os._exit(code)


def _write(line: str) -> None:
    """Write to standard error past Python's buffers and tqdm's lock, which the main thread may be holding."""
    with suppress(OSError):  # the terminal is gone
        os.write(2, f"\n{line}\n".encode())
