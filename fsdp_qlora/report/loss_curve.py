"""The picture of the loss over the steps."""

from collections.abc import Sequence
from pathlib import Path


def draw_loss_curve(path: Path, losses: Sequence[float], title: str) -> None:
    """Write a PNG of `losses` (one per step, from step 1), with a running mean where there are enough of them."""
    # Only here: importing matplotlib takes half a second and no rank but the first draws, once.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = range(1, len(losses) + 1)
    window = len(losses) // 20
    many = window >= 2
    axes.plot(
        steps, losses, color="#9db8d9" if many else "#1f5fa8", linewidth=1, marker="" if many else ".", label="step"
    )
    if many:
        means = [sum(losses[max(0, end - window) : end]) / min(window, end) for end in steps]
        axes.plot(steps, means, color="#1f5fa8", linewidth=2, label=f"mean of {window} steps")
        axes.legend(frameon=False)
    axes.set(xlabel="optimizer step", ylabel="loss per label token", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path)
