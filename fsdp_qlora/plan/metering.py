"""What passes on the meta device allocate and cost, read off them as they run.

What they ask of `kernels.device.empty` lies in the arena; what PyTorch's operators allocate by themselves, attention's
own for the most part, is loose. Kernels cost what is registered beside them (`kernels/cost.py`), operators what their
arguments say: matmuls by their sizes, all others the bytes that they read and write.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsdp_qlora.kernels.cost import Cost, listening
from fsdp_qlora.kernels.device import take_from

ROUND = 512  # bytes: what a tensor's place is a multiple of, in the arena and in PyTorch's allocator
NO_KERNEL = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias"}
OVERWRITES = {"copy_", "zero_", "fill_"}  # what their first argument was is not read


def rounded(nbytes: int) -> int:
    return -(-nbytes // ROUND) * ROUND


class Meter:
    """Source of meta tensors (`device.take_from`) that counts the bytes alive, those that are loose, and costs.

    known: tensors that were there before. tokens, adapter_columns: of the passes, and the most columns that the
    adapters of one input have; a matmul with no more than these beside its tokens is skinny."""

    def __init__(self, known: Sequence[Tensor], tokens: int, adapter_columns: int = 0) -> None:
        self.peak = 0
        self.loose = _Operators(self._note, tokens, adapter_columns)
        self.loose.know(known)
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._number = 0
        self._cost = Cost()

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        self.loose.aside = True
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self.loose.aside = False
        self.loose.know([tensor])
        self._number += 1
        self._alive[self._number] = StorageWeakRef(tensor.untyped_storage()), rounded(tensor.nbytes)
        self.peak = max(self.peak, self.live())
        return tensor

    def live(self) -> int:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(nbytes for _, nbytes in self._alive.values())

    def mark(self) -> int:
        """Begin to look for the peak anew; return the bytes alive now."""
        self.peak = self.live()
        return self.peak

    def cost(self) -> Cost:
        """Return what was counted since this was asked last."""
        cost, self._cost = self._cost, Cost()
        return cost

    def _note(self, cost: Cost) -> None:
        self._cost += cost

    @contextmanager
    def counting(self) -> Iterator[None]:
        take_from(self)
        try:
            with self.loose, listening(self._note):
                yield
        finally:
            take_from(None)


class _Operators(TorchDispatchMode):
    """Bytes of meta tensors that operators make, beside those that are known; and what each operator costs."""

    def __init__(self, note: Any, tokens: int, adapter_columns: int) -> None:
        super().__init__()
        self.peak = 0
        self.aside = False  # what is made now does not count
        self._note, self._tokens, self._adapter_columns = note, tokens, adapter_columns
        self._known: dict[int, Any] = {}  # storages, held: another's would get their number
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def know(self, tensors: Sequence[Tensor]) -> None:
        for storage in (tensor.untyped_storage() for tensor in tensors):
            self._known[storage._cdata] = StorageWeakRef(storage)
            self._made.pop(storage._cdata, None)  # scratch, which grew

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not (func.is_view or self.aside):
            made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor) and tensor.is_meta]
            for tensor in made:
                self._remember(tensor.untyped_storage())
            self.peak = max(self.peak, self.live())
            if made and func.overloadpacket.__name__ not in NO_KERNEL:
                self._note(self._cost(func.overloadpacket.__name__, args, kwargs, made))
        return out

    def _cost(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], made: list[Tensor]) -> Cost:
        if name in ("mm", "addmm", "addmm_"):
            *summand, a, b = args
            is_read = bool(summand) and kwargs.get("beta", 1) != 0
            return self._matmul(a, b, summand[0].nbytes if is_read else 0, made[0])
        given = [*args[name in OVERWRITES :], *(value for key, value in kwargs.items() if key != "out")]
        read = [tensor for tensor in tree_leaves(given) if isinstance(tensor, Tensor)]
        return Cost(bytes=sum(tensor.nbytes for tensor in (*read, *made)), launches=1)

    def _matmul(self, a: Tensor, b: Tensor, summand: int, out: Tensor) -> Cost:
        """Of a @ b [M, N], added to so many bytes."""
        flops, sizes = 2 * a.shape[0] * a.shape[1] * b.shape[1], [*a.shape, b.shape[1]]
        if self._tokens in sizes:
            sizes.remove(self._tokens)
        if min(sizes) <= self._adapter_columns:
            return Cost(skinny=flops, skinny_bytes=a.nbytes + b.nbytes + summand + out.nbytes, launches=1)
        if b.stride(0) == 1:
            return Cost(forward=flops, bytes=summand, launches=1)
        return Cost(backward=flops, bytes=summand, launches=1)

    def _remember(self, storage: Any) -> None:
        known = self._known.get(storage._cdata)
        if (known is None or known.expired()) and storage.nbytes():
            self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def begin(self) -> None:
        """Take what is alive now as there to stay, which counts no more."""
        self.live()
        self._known |= {key: storage for key, (storage, _) in self._made.items()}
        self._made, self.peak = {}, 0

    def live(self) -> int:
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(rounded(nbytes) for _, nbytes in self._made.values())
