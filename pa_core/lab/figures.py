"""DataFrames and tensors -> figures, each saved with the data behind it and where that came from.

Figures are plain ``matplotlib.figure.Figure`` objects: nothing here touches pyplot's global state.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from pa_core import masking, runs
from pa_core.data import Dataset, Part, augment
from pa_core.experiment import Comparison
from pa_core.params import ParameterError, derived_seed, home
from pa_core.proxy import Proxies
from pa_core.runs import Run
from pa_core.statistics import MARGIN

# Okabe & Ito 2008: told apart with any colour vision
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#888888"
COLOURS = (BLUE, ORANGE, GREEN, RED, "#CC79A7", "#56B4E9", "#000000")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "svg.hashsalt": "pa",  # the same figure gives the same file
    "svg.fonttype": "none",
}


styled = matplotlib.rc_context(STYLE)
"""Decorator: text and axes get the style that holds when they are made."""


def figures_home(figures_dir: str = "figures/quick") -> Path:
    """Where figures go. The default lies in the repository, whatever the working directory; others are taken from there."""
    path = Path(figures_dir).expanduser()
    return home() / path if figures_dir == "figures/quick" else path.absolute()


@dataclass(frozen=True, kw_only=True)
class Album:
    """Where a notebook saves its figures, and the command that draws them again.

    Attributes:
        figures_dir: see :func:`figures_home`.
        command: kept in every figure's provenance.
    """

    figures_dir: str = "figures/quick"
    command: str

    def __post_init__(self) -> None:
        try:
            figures_home(self.figures_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            allowed = f"no folder can be made there ({error.strerror}); allowed is a folder that can be written"
            raise ParameterError("figures_dir", self.figures_dir, allowed) from error

    @styled
    def save(
        self, figure: Figure, name: str, *, table: pd.DataFrame, used: Iterable[Run | None] = (), made_from: str = ""
    ) -> Path:
        """Write NAME.png, NAME.svg, NAME.csv (what was drawn) and NAME.json (which runs, code and command it came from).

        Args:
            used: the runs.
            made_from: where the data come from, if not from runs that are at hand.

        Returns:
            The path of the png.
        """
        folder = figures_home(self.figures_dir)
        figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        table.to_csv(folder / f"{name}.csv", index=False)
        provenance = {
            "figure": name,
            "runs": [_origin(run) for run in used if run is not None],
            **({"made_from": made_from} if made_from else {}),
            "git_commit": runs.git_commit(),
            "code_version": runs.code_version(),
            "command": self.command,
            "made": runs.now(),
        }
        (folder / f"{name}.json").write_text(json.dumps(provenance, indent=2) + "\n")
        return folder / f"{name}.png"


def saved(figures_dir: str = "figures/quick") -> pd.DataFrame:
    """The figures in a folder: name, number of rows behind it, when it was made."""
    rows = []
    for file in sorted(figures_home(figures_dir).glob("*.json")):
        if not file.with_suffix(".csv").is_file():
            continue
        content = json.loads(file.read_text())
        lines = len(pd.read_csv(file.with_suffix(".csv")))
        rows.append({"figure": content["figure"], "rows": lines, "runs": len(content["runs"]), "made": content["made"]})
    return pd.DataFrame(rows, columns=["figure", "rows", "runs", "made"])


def _origin(run: Run) -> dict[str, Any]:
    manifest = run.manifest
    return {"run": run.path.name} | {k: manifest.get(k) for k in ("digest", "code_version", "status")}


def _new(rows: int, columns: int, *, width: float, height: float, **keywords: Any) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


def _picture(ax: Axes, image: Tensor, title: str = "") -> None:
    """uint8 [3, S, S] without ticks."""
    ax.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
    ax.set_title(title, fontsize=8)
    _bare(ax)


def _bare(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _short(text: str, length: int = 16) -> str:
    """Cut to length; a dollar sign would begin a formula."""
    text = text if len(text) <= length else text[: length - 1] + "…"
    return text.replace("$", r"\$")


# 01: data


@styled
def samples(dataset: Dataset, *, per_class: int = 8, most_classes: int = 10) -> tuple[Figure, pd.DataFrame]:
    """The first training images of each class (of the first ``most_classes``), a row per class."""
    part, rows = dataset.train, []
    shown = list(dataset.classes)[:most_classes]
    figure, axes = _new(len(shown), per_class, width=0.75 * per_class + 1.2, height=0.75 * len(shown) + 0.3)
    for c, name in enumerate(shown):
        positions = (part.labels == c).nonzero().flatten()[:per_class]
        for k in range(per_class):
            _bare(axes[c, k])
        for k, image in enumerate(part.read(positions)):
            _picture(axes[c, k], image)
            rows.append({"class": name, "id": part.ids[int(positions[k])]})
        axes[c, 0].set_ylabel(_short(name), rotation=0, ha="right", va="center")
    return figure, pd.DataFrame(rows)


def balance_table(dataset: Dataset) -> pd.DataFrame:
    """Images per class (rows) and part (train, val, test)."""
    counts = {
        part.name: torch.bincount(part.labels, minlength=len(dataset.classes)).numpy()
        for part in (dataset.train, dataset.val, dataset.test)
    }
    return pd.DataFrame({"class": list(dataset.classes), **counts})


@styled
def class_balance(dataset: Dataset) -> tuple[Figure, pd.DataFrame]:
    """Images per class and part, stacked; many classes are sorted by size and drawn without names."""
    table = balance_table(dataset)
    parts = [name for name in table.columns if name != "class"]
    many = len(table) > 40
    if many:
        table = table.assign(all=table[parts].sum(1)).sort_values("all", ascending=False).drop(columns="all")
    figure, ((ax,),) = _new(1, 1, width=7.5, height=3.2)
    bottom = np.zeros(len(table))
    for name, colour in zip(parts, (BLUE, ORANGE, GREY), strict=True):
        ax.bar(
            np.arange(len(table)),
            table[name],
            bottom=bottom,
            color=colour,
            label=f"{name} ({table[name].sum():,})",
            width=0.8,
        )
        bottom += table[name].to_numpy()
    if many:
        ax.set_xlabel(f"{len(table)} classes, the largest first")
    else:
        ax.set_xticks(np.arange(len(table)), [_short(c) for c in table["class"]], rotation=40, ha="right")
    ax.set_ylabel("images")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table


@styled
def augmented(
    dataset: Dataset, kinds: str, *, columns: int = 10, draws: int = 3, seed: int = 0
) -> tuple[Figure, pd.DataFrame]:
    """The first training images as they are, and below them some draws of the augmentation."""
    originals = dataset.train.read(torch.arange(min(columns, len(dataset.train))))
    generator = torch.Generator().manual_seed(derived_seed(seed, "shown"))
    rows = [originals, *(augment(originals, kinds=kinds, generator=generator) for _ in range(draws))]
    figure, axes = _new(draws + 1, len(originals), width=0.9 * len(originals) + 0.8, height=0.95 * (draws + 1))
    for i, images in enumerate(rows):
        for k, image in enumerate(images):
            _picture(axes[i, k], image)
        axes[i, 0].set_ylabel("original" if i == 0 else f"draw {i}")
    table = [
        {
            "id": dataset.train.ids[k],
            "draw": i,
            "kinds": kinds,
            "changed_pixels": float((a[k] != originals[k]).any(0).float().mean()),
        }
        for i, a in enumerate(rows[1:], 1)
        for k in range(len(originals))
    ]
    return figure, pd.DataFrame(table)


# 02, 03: training


@styled
def curves(named: Mapping[str, Run]) -> tuple[Figure, pd.DataFrame]:
    """Loss, accuracy and learning rate by epoch; a colour per run, dashed for training; grey lines at proxy steps."""
    table = pd.concat([run.metrics.assign(run=name) for name, run in named.items()], ignore_index=True)
    figure, ((loss, accuracy, rate),) = _new(1, 3, width=10, height=3.1)
    for (name, run), colour in zip(named.items(), COLOURS, strict=False):
        m = run.metrics
        loss.plot(m["epoch"], m["train_loss"], "--", color=colour, marker=".")
        loss.plot(m["epoch"], m["val_loss"], color=colour, marker=".")
        accuracy.plot(m["epoch"], m["train_accuracy"], "--", color=colour, marker=".")
        accuracy.plot(m["epoch"], m["val_accuracy"], color=colour, marker=".", label=name)
        rate.plot(m["epoch"], m["lr"], color=colour, marker=".")
        for epoch in m["epoch"][m["stage"].diff() > 0]:
            for ax in (loss, accuracy, rate):
                ax.axvline(epoch - 0.5, color=GREY, lw=0.8, ls=":")
    loss.set(title="loss (nats), training dashed", xlabel="epoch")
    accuracy.set(title="accuracy, training dashed", xlabel="epoch")
    rate.set(title="learning rate, end of epoch", xlabel="epoch")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for ax in (loss, accuracy, rate):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=min(len(named), 4))
    return figure, table


@styled
def worst(
    part: Part, scores: Any, positions: Tensor, classes: Sequence[str], *, columns: int = 8
) -> tuple[Figure, pd.DataFrame]:
    """Images with what they are, what they were taken for, and the loss."""
    count = len(positions)
    if count == 0:
        return _nothing("no image qualifies"), pd.DataFrame(columns=["id", "label", "predicted", "loss"])
    rows = -(-count // columns)
    figure, axes = _new(rows, columns, width=1.25 * columns, height=1.65 * rows)
    for ax in axes.flat:
        _bare(ax)
    table = pd.DataFrame(
        {
            "id": [part.ids[i] for i in positions.tolist()],
            "label": [classes[i] for i in part.labels[positions].tolist()],
            "predicted": [classes[i] for i in scores.predicted[positions].tolist()],
            "loss": scores.loss[positions].numpy(),
        }
    )
    for ax, image, row in zip(axes.flat, part.read(positions), table.itertuples(), strict=False):
        colour = RED if row.label != row.predicted else "black"
        _picture(ax, image)
        ax.set_title(
            f"{_short(row.label, 14)}\n→ {_short(row.predicted, 14)}\nloss {row.loss:.1f}", fontsize=7, color=colour
        )
    return figure, table


def _nothing(text: str) -> Figure:
    """An empty figure that says why."""
    figure, ((ax,),) = _new(1, 1, width=6, height=1.2)
    ax.text(0.5, 0.5, text, ha="center", va="center", color=GREY, transform=ax.transAxes)
    _bare(ax)
    return figure


@styled
def proxies(made: Proxies | None, titles: Sequence[str] = ()) -> tuple[Figure, pd.DataFrame]:
    """A column per image: original, heatmap over it, what is masked, proxy."""
    if made is None or len(made) == 0:
        text = "the schedule has no proxy step" if made is None else "the step selected no image"
        return _nothing(text), pd.DataFrame(columns=["image", "masked_share", "changed_share"])
    n = len(made)
    names = ("original", "heatmap", "masked", "proxy")
    figure, axes = _new(4, n, width=1.2 * n + 0.8, height=5.2)
    grey = made.originals.float().mean(1)
    for k in range(n):
        _picture(axes[0, k], made.originals[k], titles[k].replace("$", r"\$") if k < len(titles) else "")
        axes[1, k].imshow(grey[k].numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes[1, k].imshow(made.maps[k].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
        axes[2, k].imshow(made.mask[k].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        _picture(axes[3, k], made.images[k])
        for row in (1, 2):
            _bare(axes[row, k])
    for row, name in enumerate(names):
        axes[row, 0].set_ylabel(name)
    share = made.mask.flatten(1).float().mean(1).numpy()
    changed = (made.images != made.originals).any(1).flatten(1).float().mean(1).numpy()
    return figure, pd.DataFrame(
        {
            "image": [t.replace("\n", " ") for t in titles] or list(range(n)),
            "masked_share": share,
            "changed_share": changed,
        }
    )


# 04: galleries


@styled
def fills(
    originals: Tensor,
    maps: Tensor,
    mask: Tensor,
    *,
    names: Sequence[str] = masking.FILLS,
    weight: float = 1.0,
    mask_region: str = "salient",
) -> tuple[Figure, pd.DataFrame]:
    """A row per image, a column per fill; the same heatmap and mask throughout. uint8 [n, 3, S, S].

    ``patch`` takes from the image above, the first row from the last; a proxy step takes from any training image.
    """
    images, rows = masking.to_float(originals), []
    if len(images) == 0:
        return _nothing("no image qualifies"), pd.DataFrame(columns=["image", "fill", "weight", "mean_change"])
    figure, axes = _new(len(images), len(names) + 1, width=1.1 * (len(names) + 1), height=1.15 * len(images) + 0.3)
    for i in range(len(images)):
        _picture(axes[i, 0], originals[i], "original" if i == 0 else "")
    for k, name in enumerate(names, 1):
        how = {"fill": name, "weight": weight, "mask_region": mask_region, "donors": images.roll(1, 0)}
        changed = masking.to_uint8(masking.apply(images, maps, mask, **how))
        for i in range(len(images)):
            _picture(axes[i, k], changed[i], name if i == 0 else "")
            difference = (changed[i].float() - originals[i].float()).abs().mean() / 255
            rows.append({"image": i, "fill": name, "weight": weight, "mean_change": float(difference)})
    return figure, pd.DataFrame(rows)


@styled
def threshold_by_weight(
    originals: Tensor,
    maps: Tensor,
    *,
    thresholds: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    fill: str = "mean",
    threshold_mode: str = "quantile",
    mask_region: str = "salient",
) -> tuple[Figure, pd.DataFrame]:
    """The first image of a batch: a row per threshold, a column per weight. uint8 [n, 3, S, S], maps [n, S, S].

    ``patch`` takes from the last image of the batch.
    """
    if len(originals) == 0:
        return _nothing("no image qualifies"), pd.DataFrame(
            columns=["threshold", "weight", "fill", "masked_share", "mean_change"]
        )
    where = {"mask_region": mask_region}
    figure, axes = _new(
        len(thresholds), len(weights), width=1.25 * len(weights) + 0.6, height=1.25 * len(thresholds) + 0.4
    )
    image, heatmap, rows = masking.to_float(originals[:1]), maps[:1], []
    donors = masking.to_float(originals[-1:])
    for i, t in enumerate(thresholds):
        mask = masking.region(heatmap, threshold_mode=threshold_mode, threshold=t, **where)
        for k, w in enumerate(weights):
            changed = masking.apply(image, heatmap, mask, fill=fill, weight=w, donors=donors, **where)
            _picture(axes[i, k], masking.to_uint8(changed)[0], f"weight {w:g}" if i == 0 else "")
            share = float(mask.float().mean())
            rows.append(
                {
                    "threshold": t,
                    "weight": w,
                    "fill": fill,
                    "masked_share": share,
                    "mean_change": float((changed - image).abs().mean()),
                }
            )
        axes[i, 0].set_ylabel(f"threshold {t:g}")
    return figure, pd.DataFrame(rows)


@styled
def compared(shown: Comparison) -> tuple[Figure, pd.DataFrame]:
    """A column per image: the image, and below it each run's heatmap over it, with what it predicts and how surely."""
    n, runs_shown = len(shown.names), list(shown.maps)
    figure, axes = _new(len(runs_shown) + 1, n, width=1.3 * n + 1, height=1.6 * (len(runs_shown) + 1))
    for k, name in enumerate(shown.names):
        _picture(axes[0, k], shown.images[runs_shown[0]][k], _short(name))
    for row, run in enumerate(runs_shown, 1):
        guesses = shown.table[shown.table["run"] == run]
        for k, (guess, sure) in enumerate(zip(guesses["predicted"], guesses["confidence"], strict=True)):
            ax = axes[row, k]
            ax.imshow(
                shown.images[run][k].float().mean(0).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest"
            )
            ax.imshow(shown.maps[run][k].numpy(), cmap="inferno", vmin=0, vmax=1, alpha=0.6, interpolation="bilinear")
            ax.set_title(f"{_short(guess)}\n{sure:.0%}", fontsize=8)
            _bare(ax)
        axes[row, 0].set_ylabel(_short(run))
    return figure, shown.table


# 04: results


@styled
def with_and_without(pairs: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """Test accuracy of each pair of runs: plain, with proxies, joined by a line."""
    if pairs.empty:
        return _nothing("no run with proxies has a plain run beside it yet: notebook 02 makes it"), pairs
    table = pairs.assign(arm=pairs["dataset"] + " " + pairs["model"] + "\n" + pairs["schedule"] + " " + pairs["xai"])
    arms = list(dict.fromkeys(table["arm"]))
    figure, ((ax,),) = _new(1, 1, width=max(4.5, 1.6 * len(arms) + 2), height=3.4)
    for i, arm in enumerate(arms):
        rows = table[table["arm"] == arm]
        for plain, other in zip(rows["plain_test_accuracy"], rows["test_accuracy"], strict=True):
            ax.plot([i - 0.15, i + 0.15], [plain, other], color=GREY, lw=0.8, zorder=1)
        ax.scatter([i - 0.15] * len(rows), rows["plain_test_accuracy"], color=BLUE, label="plain" if i == 0 else None)
        ax.scatter(
            [i + 0.15] * len(rows), rows["test_accuracy"], color=ORANGE, label="with proxies" if i == 0 else None
        )
        change = rows["test_accuracy_difference"].mean()
        ax.annotate(
            f"{100 * change:+.1f} points\nn = {len(rows)}",
            (i, rows[["plain_test_accuracy", "test_accuracy"]].to_numpy().max()),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    ax.set_xticks(range(len(arms)), arms)
    ax.set_xlim(-0.6, len(arms) - 0.4)
    ax.margins(y=0.35)
    ax.set_ylabel("test accuracy")
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table.drop(columns="arm")


BY = ("schedule", "xai", "threshold", "weight", "fraction")


@styled
def accuracy_by(frame: pd.DataFrame, *, by: Sequence[str] = BY) -> tuple[Figure, pd.DataFrame]:
    """Validation accuracy of finished runs with proxies, a panel per parameter and a dot per run; plain runs beside the schedules.

    Descriptive: runs that differ in a panel's parameter may differ in others, too.
    """
    done = frame[frame["status"] == runs.FINISHED]
    figure, axes = _new(1, len(by), width=2.1 * len(by), height=3.2, sharey=True)
    rows = []
    for ax, name in zip(axes.flat, by, strict=True):
        shown = done if name == "schedule" else done[done["proxy_steps"] > 0]
        values = sorted(shown[name].unique())
        for i, value in enumerate(values):
            group = shown[shown[name] == value]
            colours = [ORANGE if steps else BLUE for steps in group["proxy_steps"]]
            ax.scatter([i] * len(group), group["val_accuracy"], c=colours, s=22)
            ax.annotate(
                f"n={len(group)}",
                (i, group["val_accuracy"].max()),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
            rows += [
                {"parameter": name, "value": value, "run": r.run, "seed": r.seed, "val_accuracy": r.val_accuracy}
                for r in group.itertuples()
            ]
        ax.set_xticks(range(len(values)), [str(v) for v in values], rotation=30 if len(values) > 2 else 0)
        ax.set_xlim(-0.6, max(len(values), 1) - 0.4)
        ax.set_title(name)
    axes[0, 0].set_ylabel("validation accuracy")
    axes[0, 0].margins(y=0.2)
    axes[0, 0].yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    handles = [
        matplotlib.lines.Line2D([], [], ls="", marker="o", color=c, label=t)
        for c, t in ((BLUE, "plain"), (ORANGE, "with proxies"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure, pd.DataFrame(rows, columns=["parameter", "value", "run", "seed", "val_accuracy"])


@styled
def forest(table: pd.DataFrame, *, metric: str = "test_accuracy") -> tuple[Figure, pd.DataFrame]:
    """A study: each arm's difference to the reference, and the declared contrasts, with intervals; a panel per dataset and model.

    Args:
        table: of `statistics.compare`, or a committed study_X.csv.
    """
    shown = table[(table["metric"] == metric) & table["difference"].notna()]
    groups = list(shown.groupby(["dataset", "model"], sort=False))
    if not groups:
        return _nothing("no two arms of the study share a seed"), shown
    most = max(len(rows) for _, rows in groups)
    figure, axes = _new(1, len(groups), width=3.4 + 4.6 * len(groups), height=0.3 * most + 1.4, sharex=True)
    for ax, ((dataset, model), rows) in zip(axes.flat, groups, strict=True):
        y = np.arange(len(rows))[::-1]
        ax.axvspan(-100 * MARGIN, 100 * MARGIN, color=GREY, alpha=0.2, lw=0)
        ax.axvline(0, color=GREY, lw=0.8)
        for place, row in zip(y, rows.itertuples(), strict=True):
            colour = ORANGE if row.declared else BLUE
            ax.plot([100 * row.low, 100 * row.high], [place, place], color=colour, lw=1.5)
            ax.plot(100 * row.difference, place, marker="o", ms=4, color=colour)
        ax.set_yticks(y, [f"{_short(f'{row.arm} − {row.against}', 56)}  (n = {row.n})" for row in rows.itertuples()])
        ax.set_title(f"{dataset}, {model}")
        ax.set_xlabel("difference in test accuracy, in points, 95 % interval")
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", ms=4, color=c, label=t)
        for c, t in ((ORANGE, "declared"), (BLUE, "descriptive"))
    ]
    handles.append(matplotlib.patches.Patch(color=GREY, alpha=0.2, label="within half a point"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, shown


@styled
def one_at_a_time(
    table: pd.DataFrame, *, around: str, values: Mapping[str, Mapping[str, str]]
) -> tuple[Figure, pd.DataFrame]:
    """A study of one parameter at a time: a panel per parameter, the difference to the reference over its values, with intervals.

    Args:
        table: of `statistics.compare`, or a committed study_X.csv, of one dataset and model.
        around: the arm that stands in every panel.
        values: parameter -> arm -> its value there, in the order to draw.
    """
    shown = table[(table["metric"] == "test_accuracy") & table["difference"].notna()]
    values = {name: {arm: v for arm, v in arms.items() if arm in set(shown["arm"])} for name, arms in values.items()}
    if shown.empty or not any(values.values()):
        return _nothing("no two arms of the study share a seed"), shown
    rows, reference = shown.set_index("arm"), shown["against"].iloc[0]
    widths = [len(arms) + 0.5 for arms in values.values()]
    figure, axes = _new(1, len(values), width=0.62 * sum(widths) + 1.2, height=3.8, sharey=True, width_ratios=widths)
    for ax, (name, arms) in zip(axes.flat, values.items(), strict=True):
        ax.axhspan(-100 * MARGIN, 100 * MARGIN, color=GREY, alpha=0.2, lw=0)
        ax.axhline(0, color=GREY, lw=0.8)
        for place, arm in enumerate(arms):
            colour, row = ORANGE if arm == around else BLUE, rows.loc[arm]
            ax.plot([place, place], [100 * row["low"], 100 * row["high"]], color=colour, lw=1.5)
            ax.plot(place, 100 * row["difference"], marker="o", ms=4, color=colour)
        turned = any(len(value) > 5 for value in arms.values())
        ax.set_xticks(range(len(arms)), arms.values(), rotation=35 if turned else 0, ha="right" if turned else "center")
        ax.set_xlim(-0.6, len(arms) - 0.4)
        ax.set_title(name)
    counts = sorted({int(n) for n in shown["n"]})
    n = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"
    axes[0, 0].set_ylabel(f"test accuracy, difference to {reference}\nin points, 95 % interval ({n})")
    handles = [
        matplotlib.lines.Line2D([], [], marker="o", ms=4, color=c, label=t)
        for c, t in ((ORANGE, f"{around}, in every panel"), (BLUE, "one parameter changed"))
    ]
    handles.append(matplotlib.patches.Patch(color=GREY, alpha=0.2, label="within half a point"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure, shown


@styled
def decomposition(table: pd.DataFrame) -> tuple[Figure, pd.DataFrame]:
    """What a reported accuracy has beyond the honest one: a panel per honest arm, a group of bars per arm, with intervals.

    Args:
        table: of `statistics.decompose`, or a committed study_X_decomposition.csv.
    """
    if table.empty:
        return _nothing("no arm of the decomposition has all its runs"), table
    panels = [
        (key, [(arm, rows.set_index("component")) for arm, rows in group.groupby("arm", sort=False)])
        for key, group in table.groupby(["dataset", "model", "honest"], sort=False)
    ]
    colours = {"leak": RED, "extra data": ORANGE, "masking": BLUE, "total": GREY}
    most = max(len(arms) for _, arms in panels)
    figure, axes = _new(1, len(panels), width=4.4 * len(panels), height=0.62 * most + 1.5, sharex=True)
    for ax, ((dataset, _, honest), arms) in zip(axes.flat, panels, strict=True):
        for i, (_, rows) in enumerate(arms):
            for k, (name, colour) in enumerate(colours.items()):
                row, place = rows.loc[name], most - i - 0.2 * k
                ax.barh(place, 100 * row["mean"], height=0.18, color=colour)
                ax.plot([100 * row["low"], 100 * row["high"]], [place, place], color="black", lw=0.9)
        ticks = [f"{_short(arm, 40)}\n(n = {rows['n'].iloc[0]})" for arm, rows in arms]
        ax.set_yticks([most - i - 0.3 for i in range(len(arms))], ticks)
        ax.set_ylim(0.2, most + 0.3)
        ax.axvline(0, color=GREY, lw=0.8)
        ax.set_title(f"{dataset}: beyond the test accuracy of\n{honest}")
        ax.set_xlabel("points, 95 % interval")
    handles = [matplotlib.patches.Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure, table


@styled
def confusion(matrix: pd.DataFrame, *, most_named: int = 30) -> tuple[Figure, pd.DataFrame]:
    """Row-normalised colours, counts written in; many classes go without names and counts."""
    n = len(matrix)
    named = n <= most_named
    side = max(4.2, 0.42 * n + 1.6) if named else 7
    figure, ((ax,),) = _new(1, 1, width=side + 0.8, height=side)
    share = matrix.to_numpy() / np.maximum(matrix.to_numpy().sum(1, keepdims=True), 1)
    drawn = ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    if named:
        for i in range(n):
            for k in range(n):
                if matrix.iat[i, k]:
                    ax.text(
                        k,
                        i,
                        matrix.iat[i, k],
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if share[i, k] > 0.5 else "black",
                    )
        ax.set_xticks(range(n), [_short(str(c)) for c in matrix.columns], rotation=45, ha="right")
        ax.set_yticks(range(n), [_short(str(c)) for c in matrix.index])
    ax.set(xlabel="predicted", ylabel="true")
    figure.colorbar(drawn, ax=ax, shrink=0.7, label="share of the true class")
    table = matrix.stack().rename("images").rename_axis(["true_class", "predicted_class"]).reset_index()
    return figure, table


@styled
def class_changes(table: pd.DataFrame, *, most: int = 10) -> tuple[Figure, pd.DataFrame]:
    """F1 per class of the plain run and the one with proxies: the classes that gained and lost most."""
    half = most // 2
    shown = table if len(table) <= most else pd.concat([table.head(half), table.tail(half)])
    shown = shown.iloc[::-1]
    figure, ((ax,),) = _new(1, 1, width=6.5, height=0.34 * len(shown) + 1.1)
    y = np.arange(len(shown))
    ax.hlines(y, shown["f1_plain"], shown["f1_proxy"], color=GREY, lw=1)
    ax.scatter(shown["f1_plain"], y, edgecolors=BLUE, facecolors="none", s=55, label="plain", zorder=2)
    ax.scatter(shown["f1_proxy"], y, color=ORANGE, s=25, label="with proxies", zorder=3)
    changes = ["" if pd.isna(d) else f"{round(100 * d, 1) + 0.0:+.1f}, " for d in shown["f1_change"]]
    labels = [f"{_short(c)}  ({d}n = {s})" for c, d, s in zip(shown["class"], changes, shown["support"], strict=True)]
    ax.set_yticks(y, labels)
    ax.set_xlabel("F1 on the test images (change in points, test images of the class)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure, table
