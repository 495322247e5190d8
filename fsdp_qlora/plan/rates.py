"""What a machine does, as the plan's arithmetic takes it: measured (`calibrate/`) or expected (`expected.py`)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a machine does, slowest rank of all. Bytes per second unless another unit is named; 0.0: not measured.

    matmul_forward, matmul_backward: FLOP/s of a block's products with the weight transposed and not, at the run's
    tokens. attention_forward, attention_backward: FLOP/s, counting the keys that are seen. copy: in device memory, read
    and written both counted. dequantize: stored bytes read and numbers written. h2d: pinned host memory to the device;
    h2d_both, d2h_both: each direction while the other is busy as well; all ranks of the node at once. gather,
    reduce: received by a rank in an all-gather and a reduce-scatter over all ranks. crowding: how many times longer a
    product takes while a gather runs beside it. launch: seconds of the host per kernel or op.
    """

    matmul_forward: float
    matmul_backward: float
    attention_forward: float
    attention_backward: float
    copy: float
    dequantize: float
    h2d: float
    h2d_both: float
    d2h_both: float
    gather: float
    reduce: float
    crowding: float
    launch: float
