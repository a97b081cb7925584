# SPDX-License-Identifier: Apache-2.0
"""A plot of the dispatch/combine table; matplotlib is optional."""

from __future__ import annotations

from moe_measure import PHASES
from moe_report import Row, by_cell


def write_plot(path: str, rows: list[Row], title: str) -> str | None:
    """Draw the phases of every contender, stacked, cell by cell, and the wire's limit.

    A short line marks the median of the whole operation. With more than 6 cells the
    bars give way to lines: the whole, and dispatch and combine as ratios. Returns why
    there is no plot if matplotlib is not installed, else None.
    """
    try:
        import matplotlib
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = by_cell(rows)
    if len(cells) <= 6:
        width = max(7, 1.1 * len(rows) ** 0.75 + 3)
        figure, axes = plt.subplots(figsize=(width, 5))
        _draw_bars(axes, cells)
    else:
        width = min(16, 4 + len(cells) / 3)
        figure, (axes, ratio_axes) = plt.subplots(2, 1, sharex=True, figsize=(width, 8))
        _draw_times(axes, cells)
        _draw_ratios(ratio_axes, cells)
    axes.set_ylabel("ms, slowest rank, median")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize="small")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return None


def _draw_bars(axes, cells: dict[str, dict[str, Row]]) -> None:
    """One bar per contender, a group of bars per cell."""
    colours = dict(zip(PHASES, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    place, places, labels = 0.0, [], []
    for cell, contenders in cells.items():
        begin = place
        for contender, row in contenders.items():
            bottom = 0.0
            for phase in PHASES:
                height = getattr(row, f"{phase}_ms")
                axes.bar(place, height, 0.8, bottom, color=colours[phase])
                bottom += height
            axes.hlines(row.median_ms, place - 0.4, place + 0.4, "black")
            places.append(place)
            labels.append(contender)
            place += 1
        limit = next(iter(contenders.values())).limit_ms
        if limit is not None:
            axes.hlines(limit, begin - 0.5, place - 0.5, "tab:red", "dashed")
        axes.annotate(
            cell.replace(" E=", "\nE="),
            ((begin + place - 1) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="bottom",
            fontsize="x-small",
        )
        place += 1
    axes.set_xticks(places, labels, rotation=60, ha="right", fontsize="small")
    for phase, colour in colours.items():
        axes.bar(0, 0, color=colour, label=phase)
    axes.plot([], [], color="black", label="in one go")
    axes.plot([], [], "--", color="tab:red", label="limit of the wire")


def _draw_times(axes, cells: dict[str, dict[str, Row]]) -> None:
    """Time of the whole, one line per contender over all cells."""
    for contender in _contenders(cells):
        times = [rows[contender].median_ms for rows in cells.values()]
        axes.plot(range(len(cells)), times, "o-", label=contender)
    limits = [next(iter(rows.values())).limit_ms for rows in cells.values()]
    if None not in limits:
        axes.plot(range(len(cells)), limits, "--", label="limit of the wire")
    axes.set_yscale("log")


def _draw_ratios(axes, cells: dict[str, dict[str, Row]]) -> None:
    """Dispatch and combine: time of the first contender over that of each other."""
    first, *others = _contenders(cells)
    for contender in others:
        for phase, style in (("dispatch", "o-"), ("combine", "x:")):
            ratios = [
                getattr(rows[first], f"{phase}_ms")
                / getattr(rows[contender], f"{phase}_ms")
                for rows in cells.values()
            ]
            label = f"{phase}, {first} / {contender}"
            axes.plot(range(len(cells)), ratios, style, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_ylabel("ratio of times")
    axes.grid(True, axis="y", alpha=0.3)
    if others:
        axes.legend(fontsize="small")
    labels = [cell.partition(" E=")[0] for cell in cells]
    axes.set_xticks(range(len(cells)), labels, rotation=90, fontsize="x-small")


def _contenders(cells: dict[str, dict[str, Row]]) -> list[str]:
    return list(next(iter(cells.values())))
