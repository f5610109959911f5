"""The plots of `make bench-kv`."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_rates(rates: dict[str, dict[int, list[float]]], path: Path) -> None:
    """Median GB/s by size, a line for each way, with the quartiles as a band; the legend names the fastest first."""
    figure, axes = plt.subplots(figsize=(10, 5.5), layout="constrained")
    palette = matplotlib.colormaps["tab20"]
    colors = {name: palette(number) for number, name in enumerate(rates)}
    for name in sorted(rates, key=lambda name: -statistics.median(list(rates[name].values())[-1])):
        sizes = list(rates[name])
        low, median, high = zip(*(statistics.quantiles(values, n=4) for values in rates[name].values()), strict=True)
        ours = name.startswith(("tcp", "shm"))
        axes.plot(sizes, median, "o-" if ours else "s--", label=name, lw=2.5 if ours else 1, color=colors[name])
        axes.fill_between(sizes, low, high, alpha=0.12, color=colors[name])
    axes.set(xscale="log", yscale="log", xlabel="MiB of KV pages", ylabel="GB/s", title="Pages from process to process")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    bottom, top = axes.get_ylim()
    shown = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if bottom <= tick <= top]
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=9, title="solid: Headrace")
    figure.savefig(path, dpi=110)
    plt.close(figure)
