"""The loss curve of a run as an image."""

from __future__ import annotations

from pathlib import Path

from gpt.training.run_log import read_log
from kernels.files import replacing


def plot_log(log: Path, image: Path) -> None:
    """Draws the losses in a `log.jsonl`, and the bigram baseline if the log has it, to the file `image`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(read_log(log))
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style in (
        ("train_loss", {"linewidth": 0.8, "alpha": 0.7}),
        ("validation_loss", {"marker": "o", "markersize": 3}),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    if records and (bigram := records[-1].get("bigram_loss")) is not None:
        axes.axhline(bigram, linestyle="--", color="gray", linewidth=1, label="bigram baseline")
    # A folder's name may have bytes that are not text, and a $ is not the beginning of a formula.
    name = image.resolve().parent.name.encode("utf-8", "backslashreplace").decode()
    axes.set_title(name, parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    with replacing(image) as file:
        figure.savefig(file, format="png", dpi=120)
