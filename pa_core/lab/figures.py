"""DataFrames and tensors -> matplotlib figures and what was drawn, saved with where it came from; no pyplot."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from pa_core import batch, masking, runs
from pa_core.augment import generators
from pa_core.data import Dataset, Part
from pa_core.errors import ParameterError
from pa_core.files import home
from pa_core.lab.results import usable
from pa_core.lab.statistics import COMPONENTS, MARGIN, WITHIN_MARGIN
from pa_core.params import FILLS, Experiment
from pa_core.proxy import Proxies
from pa_core.runs import Run
from pa_core.selection import Scores

Drawn = tuple[Figure, pd.DataFrame]
Labelled = Mapping[str, Any]
# One colour per meaning (Okabe & Ito 2008)
PLAIN, PROXIED, WRONG, NEUTRAL, DECLARED = "#0072B2", "#E69F00", "#D55E00", "#888888", "#000000"
ARMS = {"plain": PLAIN, "with proxies": PROXIED}
PARTS = {"train": "#444444", "val": "#888888", "test": "#CCCCCC"}
COMPONENT_COLOURS = dict(zip(COMPONENTS, ("#CC79A7", "#CCCCCC", "#56B4E9", PROXIED, "#444444"), strict=True))
BAND: Any = {"color": NEUTRAL, "alpha": 0.2, "lw": 0}
ABOVE: Any = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 7}
STYLE: Any = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 160, "svg.fonttype": "none"}
STYLE |= {"svg.hashsalt": "pa"}  # the same figure gives the same file


class Album:
    """Where a notebook saves its figures, whose style it sets, and the command that draws them again."""

    def __init__(self, *, figures_dir: str = "figures/quick", command: str) -> None:
        default = figures_dir == "figures/quick"  # it lies in the repository, whatever the working directory
        self.folder = home() / figures_dir if default else Path(figures_dir).expanduser().absolute()
        self.command = command
        matplotlib.style.use(STYLE)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"must be a writable folder ({error.strerror})"
            raise ParameterError("figures_dir", figures_dir, allowed) from error

    def save(
        self, figure: Figure, name: str, *, table: pd.DataFrame, used: Iterable[Run | None] = (), made_from: str = ""
    ) -> Path:
        """Write NAME.png, .svg, .csv (what was drawn) and .json (from which runs, or what else, code and command)."""
        path = self.folder / name
        for suffix, metadata in ((".png", "Software"), (".svg", "Date")):
            figure.savefig(path.with_suffix(suffix), bbox_inches="tight", metadata={metadata: None})
        table.to_csv(path.with_suffix(".csv"), index=False)
        made = [{"run": r.path.name} | {k: r.manifest.get(k) for k in ("digest", "code_version")} for r in used if r]
        versions = sorted({str(run["code_version"]) for run in made} or {runs.code_version()})
        provenance = {"figure": name, "runs": made} | ({"made_from": made_from} if made_from else {})
        provenance |= {"code_versions": versions, "git_commit": runs.git_commit(), "command": self.command}
        provenance["made"] = runs.now()
        path.with_suffix(".json").write_text(json.dumps(provenance, indent=2) + "\n")
        return path.with_suffix(".png")


def _new(rows: int, columns: int, *, width: float, height: float, **keywords: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def _empty(text: str, columns: Iterable[str]) -> Drawn:
    """A figure that says why there is nothing to see, and a table without rows."""
    figure, ((ax,),) = _new(1, 1, width=6, height=1.2)
    ax.text(0.5, 0.5, text, ha="center", va="center", color=NEUTRAL, transform=ax.transAxes)
    ax.set_axis_off()
    return figure, pd.DataFrame(columns=list(columns))


def _grid(rows: Labelled, *, cell: tuple[float, float], titles: Labelled = {}, maps: Labelled = {}) -> Figure:  # noqa: B006
    """Label -> a row of uint8 images [3, S, S], with ``titles``, in grey under ``maps`` [S, S]; ``cell`` in inches."""
    most = max(map(len, rows.values()), default=0)
    if not most:
        return _empty("no image was selected", [])[0]
    figure, axes = _new(len(rows), most, width=cell[0] * most + 0.8, height=cell[1] * len(rows) + 0.3)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(_short(name))
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for i, (ax, image) in enumerate(zip(row, images, strict=False)):
            if name in maps:
                ax.imshow(image.float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                ax.imshow(maps[name][i].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
            else:
                ax.imshow(image.permute(1, 2, 0).cpu().numpy(), interpolation="nearest")
            if name in titles:
                ax.set_title(titles[name][i].replace("$", r"\$"), fontsize=8)  # a dollar sign would begin a formula
    return figure


def _short(text: object, length: int = 16) -> str:
    text = str(text)
    return (text if len(text) <= length else text[: length - 1] + "…").replace("$", r"\$")


def _key(figure: Figure, dots: Mapping[Any, str], *more: Any) -> None:
    """A legend below the figure: label -> colour of a dot, and other handles."""
    handles = [Line2D([], [], color=colour, label=name, ls="", marker="o", ms=5) for name, colour in dots.items()]
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=min(len(handles) + len(more), 5))


def samples(dataset: Dataset, *, per_class: int = 8, most_classes: int = 10) -> Drawn:
    """The first training images of each class (of the first ``most_classes``), a row per class."""
    part, rows, table = dataset.train, {}, []
    for c, name in enumerate(dataset.classes[:most_classes]):
        positions = (part.labels == c).nonzero().flatten()[:per_class]
        rows[name] = part.read(positions)
        table += [{"class": name, "id": part.ids[i]} for i in positions.tolist()]
    return _grid(rows, cell=(0.8, 0.8)), pd.DataFrame(table)


def class_balance(dataset: Dataset) -> Drawn:
    """Images per class and part, stacked; many classes are sorted by size and drawn without names."""
    table = pd.DataFrame({"class": list(dataset.classes)})
    for part in (dataset.train, dataset.val, dataset.test):
        table[part.name] = part.labels.bincount(minlength=len(table)).numpy()
    many, places, bottom = len(table) > 40, range(len(table)), 0
    if many:
        table = table.loc[table[list(PARTS)].sum(axis=1).sort_values(ascending=False, kind="stable").index]
    figure, ((ax,),) = _new(1, 1, width=7.5, height=3.2)
    for name, colour in PARTS.items():
        ax.bar(places, table[name], 0.8, bottom, color=colour, label=f"{name} ({table[name].sum():,})")
        bottom += table[name].to_numpy()
    ax.set_xticks([] if many else places, [] if many else map(_short, table["class"]), rotation=40, ha="right")
    ax.set(ylabel="images", xlabel=f"{len(table)} classes, the largest first" if many else "")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table


def augmented(dataset: Dataset, experiment: Experiment, *, columns: int = 10, draws: int = 3) -> Drawn:
    """The first training images as they are, and below them as the network sees them in some epochs."""
    part, e, index = dataset.train, experiment, torch.arange(min(columns, len(dataset.train)))
    rows, table = {"original": (originals := part.read(index).cpu())}, []
    how = {"classes": len(dataset.classes), "pool": batch.Pool.of(part), "index": index, "experiment": e}
    for k in range(1, draws + 1):
        made = batch.make(originals, part.labels[index], draws=generators(e.seed, k), **how)
        images = rows[f"draw {k}"] = masking.to_uint8(made.images)
        changed = (images != originals).any(1).float().mean((1, 2)).tolist()
        table += [[part.ids[i], k, e.augment, share] for i, share in enumerate(changed)]
    return _grid(rows, cell=(0.9, 0.95)), pd.DataFrame(table, columns=["id", "draw", "kinds", "changed_pixels"])


def curves(named: Mapping[str, Run]) -> Drawn:
    """Loss, accuracy and learning rate by epoch; a colour per run, dashed for training; dotted lines between stages."""
    figure, ((loss, accuracy, rate),) = _new(1, 3, width=10, height=3.1)
    others, tables = iter((PROXIED, "#009E73", "#CC79A7", "#56B4E9")), []
    for name, run in named.items():
        m, colour = run.metrics, PLAIN if name == "plain" else next(others, NEUTRAL)
        tables.append(m.assign(run=name))
        for ax, measure in ((loss, "loss"), (accuracy, "accuracy")):
            ax.plot(m["epoch"], m[f"train_{measure}"], "--", color=colour, marker=".")
            ax.plot(m["epoch"], m[f"val_{measure}"], color=colour, marker=".", label=name)
        rate.plot(m["epoch"], m["lr"], color=colour, marker=".")
        for ax in (loss, accuracy, rate):
            for epoch in m["epoch"][m["stage"].diff() > 0]:
                ax.axvline(epoch - 0.5, color=NEUTRAL, lw=0.8, ls=":")
    titles = ("loss (nats), training dashed", "accuracy, training dashed", "learning rate, end of epoch")
    for ax, title in zip((loss, accuracy, rate), titles, strict=True):
        ax.set(title=title, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    _key(figure, {}, *accuracy.get_legend_handles_labels()[0])
    return figure, pd.concat(tables, ignore_index=True)


def worst(part: Part, scores: Scores, positions: Tensor, classes: Sequence[str], *, columns: int = 8) -> Drawn:
    """Images with what they are, what they were taken for, and the loss."""
    names, ids = np.array(classes), [part.ids[i] for i in positions.tolist()]
    found = {"id": ids, "label": names[part.labels[positions]], "predicted": names[scores.predicted[positions]]}
    table = pd.DataFrame(found | {"loss": scores.loss[positions]})
    figure = _grid({" " * i: part.read(at) for i, at in enumerate(positions.split(columns))}, cell=(1.25, 1.65))
    for ax, row in zip(figure.axes, table.itertuples(), strict=False):
        title = f"{_short(row.label, 14)}\n→ {_short(row.predicted, 14)}\nloss {row.loss:.1f}"
        ax.set_title(title, fontsize=8, color="black" if row.label == row.predicted else WRONG)
    return figure, table


def proxies(made: Proxies | None, titles: Sequence[str] = ()) -> Drawn:
    """A column per image: original, heatmap over it, what is masked, proxy. None where there was no proxy step."""
    if made is None:
        return _empty("the schedule has no proxy step", ["image", "masked_share", "changed_share"])
    titles = list(titles) or [str(k) for k in range(len(made.images))]
    grey = made.mask.to(torch.uint8).mul(255).unsqueeze(1).expand(-1, 3, -1, -1)
    rows = {"original": made.originals, "heatmap": made.originals, "masked": grey, "proxy": made.images}
    table = {"image": [title.replace("\n", " ") for title in titles], "masked_share": made.mask.float().mean((1, 2))}
    table["changed_share"] = (made.images != made.originals).any(1).float().mean((1, 2))
    figure = _grid(rows, cell=(1.2, 1.25), titles={"original": titles}, maps={"heatmap": made.maps})
    return figure, pd.DataFrame(table)


def fills(made: Proxies, *, mask_region: str = "salient") -> Drawn:
    """A row per image, a column per fill, with weight 1; ``patch`` takes from the image above."""
    images, table = masking.to_float(made.originals), []
    rows = {f"image {i}": [image] for i, image in enumerate(made.originals)}
    how = {"mask_region": mask_region, "donors": images.roll(1, 0)}
    for fill in FILLS if rows else ():
        changed = masking.apply(images, made.maps, made.mask, fill=fill, **how)
        for row, image in zip(rows.values(), masking.to_uint8(changed), strict=True):
            row.append(image)
        table += [[i, fill, x] for i, x in enumerate((changed - images).abs().mean((1, 2, 3)).tolist())]
    figure = _grid(rows, cell=(1.1, 1.15), titles={"image 0": ["original", *FILLS]})
    return figure, pd.DataFrame(table, columns=["image", "fill", "mean_change"])


def threshold_by_weight(made: Proxies, *, fill: str = "mean", mask_region: str = "salient") -> Drawn:
    """The first image: a row per quantile, a column per weight. ``patch`` takes from the last image."""
    image, maps, rows, table = masking.to_float(made.originals[:1]), made.maps[:1], {}, []
    columns, weights = ["threshold", "weight", "fill", "masked_share", "mean_change"], (0.0, 0.25, 0.5, 0.75, 1.0)
    how = {"fill": fill, "mask_region": mask_region, "donors": masking.to_float(made.originals[-1:])}
    for t in (0.25, 0.5, 0.75, 0.9):
        mask = masking.region(maps, threshold_mode="quantile", threshold=t, mask_region=mask_region)
        changed = torch.cat([masking.apply(image, maps, mask, weight=w, **how) for w in weights])
        rows[f"threshold {t:g}"] = masking.to_uint8(changed)
        changes = (changed - image).abs().mean((1, 2, 3)).tolist()
        table += [[t, w, fill, float(mask.float().mean()), x] for w, x in zip(weights, changes, strict=False)]
    titles = {"threshold 0.25": [f"weight {w:g}" for w in weights]}
    return _grid(rows, cell=(1.25, 1.25), titles=titles), pd.DataFrame(table, columns=columns)


def compared(images: Mapping[str, Tensor], maps: Mapping[str, Tensor], table: pd.DataFrame) -> Drawn:
    """A column per image: the image, and below it each run's heatmap over it, with what it predicts and how surely."""
    titles = {"": [_short(name) for name in table["image"].unique()]}
    for run, rows in table.groupby("run"):
        titles[str(run)] = [f"{_short(row.predicted)}\n{row.confidence:.0%}" for row in rows.itertuples()]
    return _grid({"": next(iter(images.values())), **images}, cell=(1.3, 1.6), titles=titles, maps=maps), table


def with_and_without(pairs: pd.DataFrame) -> Drawn:
    """Test accuracy of each pair of runs: plain, with proxies, joined by a line."""
    if pairs.empty:
        return _empty("no run with proxies has a plain run beside it yet: notebook 02 makes it", pairs.columns)
    labels = pairs["dataset"] + " " + pairs["model"] + "\n" + pairs["schedule"] + " " + pairs["xai"]
    arms = list(pairs.groupby(labels, sort=False))
    figure, ((ax,),) = _new(1, 1, width=max(4.5, 1.6 * len(arms) + 2), height=3.4)
    for i, (_, rows) in enumerate(arms):
        both = rows[["plain_test_accuracy", "test_accuracy"]].to_numpy()
        ax.plot([i - 0.15, i + 0.15], both.T, color=NEUTRAL, lw=0.8, zorder=1)
        ax.scatter([i - 0.15] * len(rows), both[:, 0], color=PLAIN)
        ax.scatter([i + 0.15] * len(rows), both[:, 1], color=PROXIED)
        gain = f"{100 * rows['test_accuracy_difference'].mean():+.1f} points\nn = {len(rows)}"
        ax.annotate(gain, (i, both.max()), **ABOVE)
    ax.set_xticks(range(len(arms)), [str(label) for label, _ in arms])
    ax.set(xlim=(-0.6, len(arms) - 0.4), ylabel="test accuracy", ymargin=0.35)
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    _key(figure, ARMS)
    return figure, pairs


def accuracy_by(frame: pd.DataFrame) -> Drawn:
    """Validation accuracy, a panel per parameter and a dot per run with proxies; plain runs beside the schedules."""
    done, rows, by = usable(frame), [], ("schedule", "xai", "threshold", "weight", "fraction")
    figure, axes = _new(1, len(by), width=2.1 * len(by), height=3.2, sharey=True)
    for ax, name in zip(axes.flat, by, strict=True):
        shown = done if name == "schedule" else done[done["proxy_steps"] > 0]
        groups = list(shown.groupby(name))
        for i, (value, group) in enumerate(groups):
            ax.scatter([i] * len(group), group["val_accuracy"], 22, np.where(group["proxy_steps"] > 0, PROXIED, PLAIN))
            ax.annotate(f"n={len(group)}", (i, group["val_accuracy"].max()), **ABOVE)
            rows += [[name, value, r.run, r.seed, r.val_accuracy] for r in group.itertuples()]
        ax.set_xticks(range(len(groups)), [str(v) for v, _ in groups], rotation=30 if len(groups) > 2 else 0)
        ax.set(xlim=(-0.6, max(len(groups), 1) - 0.4), title=name)
    axes[0, 0].set(ylabel="validation accuracy", ymargin=0.2)
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1))
    _key(figure, ARMS)
    return figure, pd.DataFrame(rows, columns=["parameter", "value", "run", "seed", "val_accuracy"])


def forest(
    table: pd.DataFrame, *, metric: str = "test_accuracy", around: str = "", values: Mapping[str, Any] | None = None
) -> Drawn:
    """The differences in a table of `statistics.compare` with their intervals, a panel per dataset and model; or, with
    ``values`` (parameter -> arm -> its value), one per parameter, with the arm ``around`` in each.
    """
    shown = table[(table["metric"] == metric) & table["difference"].notna()]
    if values is None:
        panel, label = shown["dataset"] + ", " + shown["model"], shown["arm"] + " − " + shown["against"]
        drawn = shown.assign(panel=panel, label=label, colour=np.where(shown["declared"], DECLARED, NEUTRAL))
        key = {"declared": DECLARED, "descriptive": NEUTRAL}
    else:
        named = [(name, arm, value) for name, arms in values.items() for arm, value in arms.items()]
        drawn = pd.DataFrame(named, columns=["panel", "arm", "label"]).merge(shown, on="arm")
        drawn["label"] += " − " + drawn["against"]
        drawn["colour"] = np.where(drawn["arm"] == around, PROXIED, NEUTRAL)
        key = {f"{around}, in every panel": PROXIED, "one parameter changed": NEUTRAL}
    if drawn.empty:
        return _empty("no two arms of the study share a seed", shown.columns)
    panels = list(drawn.groupby("panel", sort=False))
    heights = [len(rows) + 1 for _, rows in panels]
    figure, axes = _new(len(panels), 1, width=7.5, height=0.24 * sum(heights) + 0.9, sharex=True, height_ratios=heights)
    for ax, (title, rows) in zip(axes.flat, panels, strict=True):
        y = range(len(rows))
        ax.axvspan(-100 * MARGIN, 100 * MARGIN, **BAND)
        ax.axvline(0, color=NEUTRAL, lw=0.8)
        ax.hlines(y, 100 * rows["low"], 100 * rows["high"], color=rows["colour"], lw=1.5)
        ax.scatter(100 * rows["difference"], y, color=rows["colour"], s=20, zorder=2)
        ax.set_yticks(y, [f"{_short(row.label, 56)}  (n = {row.n})" for row in rows.itertuples()])
        ax.set(title=title, ylim=(len(rows) - 0.5, -0.5))
    axes[-1, 0].set_xlabel(f"difference in {metric.replace('_', ' ')}, in points, 95 % interval")
    _key(figure, key, Patch(label=WITHIN_MARGIN, **BAND))
    return figure, shown


def decomposition(table: pd.DataFrame) -> Drawn:
    """A table of `statistics.decompose`: a panel per honest arm, a group of bars per arm, with intervals."""
    if table.empty:
        return _empty("no arm of the decomposition has all its runs", table.columns)
    panels = list(table.groupby(["dataset", "honest"], sort=False))
    most = max(group["arm"].nunique() for _, group in panels)
    figure, axes = _new(1, len(panels), width=4.4 * len(panels), height=0.68 * most + 1.5, sharex=True)
    for ax, (key, group) in zip(axes.flat, panels, strict=True):
        arms = list(group.groupby("arm", sort=False))
        for i, (_, rows) in enumerate(arms):
            r = 100 * rows.set_index("component")[["mean", "low", "high"]]
            y, errors = most - i - 0.16 * np.arange(len(r)), (r["mean"] - r["low"], r["high"] - r["mean"])
            ax.barh(y, r["mean"], 0.15, color=COMPONENT_COLOURS.values(), xerr=errors, error_kw={"elinewidth": 0.9})
        ticks = [f"{_short(arm, 40)}\n(n = {rows['n'].iloc[0]})" for arm, rows in arms]
        ax.set_yticks([most - i - 0.32 for i in range(len(arms))], ticks)
        ax.axvline(0, color=NEUTRAL, lw=0.8)
        ax.set(ylim=(0.2, most + 0.3), xlabel="points, 95 % interval")
        ax.set_title("{}: beyond the test accuracy of\n{}".format(*key))
    _key(figure, COMPONENT_COLOURS)
    return figure, table


def confusion(matrix: pd.DataFrame) -> Drawn:
    """Row-normalised colours, counts written in; more than 30 classes go without names and counts."""
    n, counts = len(matrix), matrix.to_numpy()
    side, share = max(4.2, 0.42 * n + 1.6) if n <= 30 else 7, counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, ((ax,),) = _new(1, 1, width=side + 0.8, height=side)
    colours = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(colours, ax=ax, shrink=0.7, label="share of the true class")
    if n <= 30:
        for i, k in np.argwhere(counts):
            colour = "white" if share[i, k] > 0.5 else "black"
            ax.text(k, i, str(counts[i, k]), ha="center", va="center", fontsize=7, color=colour)
        ax.set_xticks(range(n), map(_short, matrix.columns), rotation=45, ha="right")
        ax.set_yticks(range(n), map(_short, matrix.index))
    ax.set(xlabel="predicted", ylabel="true")
    return figure, matrix.stack().rename("images").rename_axis(["true_class", "predicted_class"]).reset_index()


def class_changes(table: pd.DataFrame, *, most: int = 10) -> Drawn:
    """F1 per class of the plain run and the one with proxies: the classes that gained and lost most."""
    ends = table if len(table) <= most else pd.concat([table.head(most // 2), table.tail(most // 2)])
    shown, y = ends.iloc[::-1], range(len(ends))
    figure, ((ax,),) = _new(1, 1, width=6.5, height=0.34 * len(shown) + 1.4)
    ax.hlines(y, shown["f1_plain"], shown["f1_proxy"], color=NEUTRAL, lw=1)
    ax.scatter(shown["f1_plain"], y, color=PLAIN, s=50, zorder=2)
    ax.scatter(shown["f1_proxy"], y, color=PROXIED, s=25, zorder=3)
    changes = ["" if pd.isna(d) else f"{round(100 * d, 1) + 0.0:+.1f}, " for d in shown["f1_change"]]
    labels = [f"{_short(c)}  ({d}n = {s})" for c, d, s in zip(shown["class"], changes, shown["support"], strict=True)]
    ax.set(yticks=y, yticklabels=labels, xlabel="F1 on the test images (change in points, test images of the class)")
    _key(figure, ARMS)
    return figure, table
