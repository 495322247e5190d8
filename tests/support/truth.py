"""How good an op must be: its error against float64 at most twice what plain PyTorch makes in the same dtype."""

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What kernels are tested in. Triton's interpreter cuts bits off where a GPU rounds to bfloat16, so only there.
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])


def assert_as_good_as_plain(ours: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str = "") -> None:
    """ours, plain: what the op and plain PyTorch give in one dtype; truth: float64, from the same inputs.

    Largest and root-mean-square error are both held to it. A few float32 units of the last place are granted where
    plain PyTorch is exact by luck. Fails for a result of zeros, unless the truth is zero."""
    assert ours.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(truth.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, not {plain.dtype}"
    ours, plain, truth = (t.detach().double().cpu() for t in (ours, plain, truth))
    assert torch.isfinite(ours).all(), f"{name}: not finite"
    if truth.numel() == 0:
        return
    for measure in (lambda x: x.abs().max().item(), lambda x: x.square().mean().sqrt().item()):
        size, wrong, allowed = measure(truth), measure(ours - truth), 2 * measure(plain - truth)
        floor = 4 * 2.0**-24 * size
        assert wrong <= allowed + floor, f"{name}: error {wrong:.3e}, plain PyTorch's is {allowed / 2:.3e}"
        assert size == 0 or wrong < 0.5 * size, f"{name}: error {wrong:.3e} of a result of {size:.3e}"
