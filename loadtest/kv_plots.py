"""The plots of `make bench-kv`."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_rates(rates: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Median GB/s by size, a line for each way, with the quartiles as a band."""
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for name, by_size in rates.items():
        sizes = list(by_size)
        quartiles = [statistics.quantiles(values, n=4) for values in by_size.values()]
        ours = name.startswith(("tcp", "shm"))
        (line,) = axes.plot(sizes, [q[1] for q in quartiles], "o-" if ours else "o--", label=name, lw=2 if ours else 1)
        axes.fill_between(
            sizes, [q[0] for q in quartiles], [q[2] for q in quartiles], alpha=0.12, color=line.get_color()
        )
    axes.set(xscale="log", yscale="log", xlabel="MiB of KV pages", ylabel="GB/s", title="Pages from process to process")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
