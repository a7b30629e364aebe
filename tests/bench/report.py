"""All tables of figures/bench as one figure and as the tables of docs/speed.md: ``python -m tests.bench.report``."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from tests.bench import harness

COLUMNS = {"benchmark", "contender", "device", "value", "unit", "reference", "ratio"}
OURS, REFERENCE, OTHER = "#0072b2", "#999999", "#e69f00"


BEGIN = "<!-- from here on written by python -m tests.bench.report -->"


def write() -> None:
    """Draw figures/bench/speed.png and .svg, and write the tables of docs/speed.md."""
    tables = {path.stem: pd.read_csv(path) for path in sorted(harness.FOLDER.glob("*.csv"))}
    tables = {name: table for name, table in tables.items() if set(table.columns) >= COLUMNS}
    draw(tables, harness.FOLDER)
    page = harness.ROOT / "docs" / "speed.md"
    page.write_text(page.read_text().partition(BEGIN)[0] + BEGIN + "\n" + markdown(tables))


def markdown(tables: dict[str, pd.DataFrame]) -> str:
    """A table for each benchmark, and the machine that it was run on."""
    text = ""
    for name, table in tables.items():
        first = table.iloc[0]
        text += f"\n## {name}\n\n{first['device']}, {first['threads']} threads; {first['versions']}.\n\n"
        text += "| benchmark | contender | value | ratio to the reference |\n|---|---|---:|---:|\n"
        for row in table.to_dict("records"):
            text += f"| {row['benchmark']} | {row['contender']} | {row['value']:,.4g} {row['unit']} |"
            text += f" {row['ratio']:.3f} x {row['reference']} |\n"
    return text


def draw(tables: dict[str, pd.DataFrame], folder: Path) -> None:
    """A panel per table, a bar per contender, in two columns of about equal length."""
    columns: list[list[str]] = [[], []]
    filled = [0, 0]
    for name in sorted(tables, key=lambda name: -lines(tables[name])):
        shorter = filled.index(min(filled))
        columns[shorter].append(name)
        filled[shorter] += lines(tables[name]) + 4
    figure = plt.figure(figsize=(15, 0.24 * max(filled) + 0.6), layout="constrained")
    for half, names in zip(figure.subfigures(1, 2), columns, strict=True):
        if names:
            heights = [lines(tables[name]) + 2 for name in names]
            axes = half.subplots(len(names), 1, height_ratios=heights, squeeze=False)
            for axis, name in zip(axes[:, 0], names, strict=True):
                panel(axis, name, tables[name])
    for suffix in ("png", "svg"):
        figure.savefig(folder / f"speed.{suffix}", dpi=110)
    plt.close(figure)


def lines(table: pd.DataFrame) -> int:
    """Bars, and a heading for each benchmark."""
    return len(table) + table["benchmark"].nunique()


def panel(axis: Axes, name: str, table: pd.DataFrame) -> None:
    """Ratios to the reference as bars, the values beside them."""
    y, ticks, labels = 0, [], []
    most = table["ratio"].max()
    for benchmark, rows in table.groupby("benchmark", sort=False):
        axis.text(0, y, benchmark, va="center", ha="left", fontsize=8, fontweight="bold")
        y += 1
        for _, row in rows.iterrows():
            ours = harness.OURS in row["contender"] or not table["contender"].str.startswith(harness.OURS).any()
            colour = REFERENCE if row["contender"] == row["reference"] else OURS if ours else OTHER
            axis.barh(y, row["ratio"], color=colour, height=0.75)
            text = f" {row['ratio']:.2f}   {row['value']:,.4g} {row['unit']}"
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axis.text(row["ratio"] + 0.01 * most, y, text.strip(), va="center", fontsize=7.5, bbox=behind)
            ticks.append(y)
            labels.append(shorten(row["contender"], width=38, placeholder=" ..."))
            y += 1
    axis.set_yticks(ticks, labels, fontsize=7.5)
    axis.set_ylim(y - 0.4, -0.6)
    axis.set_xlim(0, most * 1.45)
    axis.axvline(1, color="black", linewidth=0.6, linestyle=":")
    axis.tick_params(axis="x", labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)
    device, threads = table["device"].iloc[0], table["threads"].iloc[0]
    axis.set_title(f"{name.rsplit('_', 1)[0]}: {device}, {threads} threads", fontsize=9.5, loc="left")
    axis.set_xlabel("ratio to the reference (grey)", fontsize=7.5)


if __name__ == "__main__":
    write()
