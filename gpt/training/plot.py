"""The loss curve of a run as an image."""

from __future__ import annotations

import json
from pathlib import Path


def plot_log(log: Path, image: Path) -> None:
    """Draws the losses in a `log.jsonl`, and the bigram baseline if the log has it, to the file `image`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for key, style in (
        ("train_loss", {"linewidth": 0.8, "alpha": 0.7}),
        ("validation_loss", {"marker": "o", "markersize": 3}),
    ):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
    if (bigram := records[-1].get("bigram_loss")) is not None:
        axes.axhline(bigram, linestyle="--", color="gray", linewidth=1, label="bigram baseline")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=image.resolve().parent.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)
