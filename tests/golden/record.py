"""Golden values: one function per section, returning {case: JSON value}.

    python -m tests.golden.record                 lists the sections
    python -m tests.golden.record masks runs      records these anew, and leaves the others alone

Strings and integers (hashes of masks, orders and draws) hold exactly, floats within ``fixed.RTOL`` and ``fixed.ATOL``.
Whoever changes a value on purpose raises ``params.SCHEMA`` and says so in CHANGELOG.md. A new method, fill, rule or
batch kind adds its name to its section here and records that section: the values that were there must stay as they are.

Everything but ``batches`` and ``runs`` was recorded with schema 1, by the code before the rebuild.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pa_core import attribution, augment, batch, data, experiment, masking, proxy, selection, train
from pa_core.batch import Pool
from pa_core.models import Classifier
from pa_core.params import Experiment, derived_seed

from .fixed import images, maps, network, rounded, sha, summary

VALUES = Path(__file__).with_name("values.json")
Values = dict[str, Any]


# Seeds


def seeds() -> Values:
    labels = [(), ("order",), ("select",), ("epoch", 3), ("noise", "a/b.png"), (1, 2, 3), (0.5, None, True)]
    return {f"{seed} {list(some)}": derived_seed(seed, *some) for seed in (0, 1, 2**31) for some in labels}


# Masks


def masks() -> Values:
    """Which pixels every rule takes. ``plateau`` has ties and values that equal the threshold."""
    found = {}
    for kind in ("distinct", "plateau", "constant"):
        for region in ("salient", "rest"):
            for mode in ("quantile", "absolute"):
                for threshold in (0.0, 0.25, 0.5, 0.9, 1.0):
                    for share in (1.0, 0.1):
                        mask = masking.region(
                            maps(kind, 2, 13),
                            mask_region=region,
                            threshold_mode=mode,
                            threshold=threshold,
                            max_share=share,
                        )
                        found[f"{kind} {region} {mode} {threshold} {share}"] = sha(mask)
    return found


def feathered() -> Values:
    """How deep inside the mask each pixel lies, in steps of the ramp."""
    coarse = maps("distinct", 2, 5) > 0.5
    mask = coarse.repeat_interleave(6, 1).repeat_interleave(5, 2)  # blocks of 6 x 5 pixels
    mask[0, 9, 8] ^= True
    widths = (0, 1, 3, 9)
    return {str(f): sha((masking.feathered(mask, feather=f) * (f + 1)).round().long()) for f in widths}


FILLS = ("zero", "one", "mean", "max", "min", "half_max", "blur", "patch", "blend", "noise", "none")


def fills() -> Values:
    """The proxies of every fill, soft and hard, and whether all other pixels are as they were."""
    pictures, heat = images(2, 16), maps("distinct", 2, 16)
    cases = {
        "hard": {"weight": 1.0},
        "soft": {"weight": 0.4, "feather": 2, "seed": 7, "ids": ["x.png", "y.png"]},
        "rest": {"weight": 0.7, "mask_region": "rest", "feather": 1},
    }
    found = {}
    for name, options in cases.items():
        mask = torch.zeros(2, 16, 16, dtype=torch.bool)
        mask[0, 2:12, 3:16] = mask[1, 5:9] = True
        for fill in FILLS:
            proxies = masking.apply(pictures, heat, mask, fill=fill, donors=pictures.flip(0), **options)
            outside = ~mask.unsqueeze(1).expand_as(pictures)
            kept = bool((proxies[outside] == pictures[outside]).all())
            found[f"{fill} {name}"] = {"outside kept": kept, "proxies": summary(proxies)}
    return found


# Controls

CONTROLS = ("random", "random_blur", "center", "rectangle", "edges", "uniform")


def controls() -> Values:
    """Maps that look at no network, and which quarter they mask."""
    model, pictures = network("test_resnet", 28), images(2, 28)
    found = {}
    for method in CONTROLS:
        for seed, smooth in ((0, "none"), (5, "none"), (5, "gaussian"), (5, "flip")):
            ids = ["first.png", "b/second.png"]
            heat = attribution.heatmaps(model, pictures, method=method, smooth=smooth, ids=ids, seed=seed)
            case = {"maps": summary(heat)}
            if method != "center" and smooth == "none":  # elsewhere the last bits of a sum or exponential may decide
                case["mask"] = sha(masking.region(heat, threshold=0.75))
            found[f"{method} {smooth} {seed}"] = case
    return found


def derangements() -> Values:
    """Who gets whose map."""
    numbers, paths = [str(i) for i in range(50)], [f"class_{i % 3}/image {i}.png" for i in range(200)]
    named = {"2": numbers[:2], "7": numbers[:7], "50": numbers, "200 paths": paths}
    return {
        f"{name}, seed {seed}": sha(attribution.derangement(ids, seed))
        for name, ids in named.items()
        for seed in (0, 9)
    }


# Selection

RULES = ("misclassified", "loss", "margin", "entropy", "random", "easiest", "all")


def _scores() -> selection.Scores:
    """Of 60 images in 5 classes."""
    logits, labels = maps("distinct", 3, 10).reshape(60, 5) * 6, torch.arange(60) % 5
    return selection.score(logits, labels)


def scores() -> Values:
    found = _scores()
    floats = {name: rounded(getattr(found, name)) for name in ("loss", "margin", "entropy")}
    return floats | {"predicted": sha(found.predicted), "labels": sha(found.labels)}


def selections() -> Values:
    """Which images, in which order; with values rounded to quarters there are many ties."""
    exact = _scores()
    tied = replace(exact, **{name: (getattr(exact, name) * 4).round() / 4 for name in ("loss", "margin", "entropy")})
    found = {}
    for by in RULES:
        for fraction in (0.01, 0.3, 1.0):
            for seed in (0, 4):
                found[f"{by} {fraction} {seed}"] = sha(selection.select(tied, by=by, fraction=fraction, seed=seed))
    among = torch.arange(60).flip(0)[::2]
    for fraction in (0.01, 0.3, 1.0):
        for seed in (0, 4):
            chosen = selection.some_wrong(tied, among=among, fraction=fraction, seed=seed)
            found[f"some_wrong {fraction} {seed}"] = sha(chosen)
    return found


# Data

EMBEDDED = {"dataset": "fashion_mini", "data_dir": None, "bad_images": "refuse", "image_size": 28}


def splits() -> Values:
    """Which image is in which part of the embedded dataset, and what the first pixels are."""
    usual = {"train_fraction": 1.0, "folds": 5, "fold": 0, "seed": 0}
    changes = (
        {},
        {"seed": 3},
        {"fold": 4},
        {"folds": 10, "fold": 7},
        {"train_fraction": 0.255},
        {"train_fraction": 0.25},
    )
    found = {}
    for change in (*changes, {"train_fraction": 0.25, "fold": 2, "seed": 3}):
        dataset = data.load(**EMBEDDED, **{**usual, **change})
        parts = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
        found[json.dumps(change)] = {
            name: {"n": len(part), "ids": sha(list(part.ids)), "labels": sha(part.labels)}
            for name, part in parts.items()
        }
        if not change:
            found["pixels"] = {name: sha(part.read(torch.arange(20))) for name, part in parts.items()}
    return found


# Explanations

CAMS = ("gradcam", "gradcam++", "hirescam", "xgradcam", "layercam", "eigencam", "eigengradcam")
SMOOTH = ("none", "gaussian", "eigen", "flip")
GRADIENTS = ("saliency", "input_x_gradient", "occlusion")
AVERAGES = (
    "integrated_gradients",
    "smoothgrad",
    "gradient_shap",
)  # on ReLUs, rounding may change one of their passes
RELU = ("guided_backprop", "deconvolution", "guided_gradcam", "deeplift")
ATTENTION = ("attention_rollout", "chefer")
TARGET = torch.tensor([3, 2])


def _heatmaps(model: Classifier, methods: Iterable[str], smooths: Iterable[str] = ("none",)) -> Values:
    """Maps of two images, each of a class for which no method's map is blank."""
    pictures, found = images(2, model.image_size), {}
    for method in methods:
        for smooth in smooths:
            heat = attribution.heatmaps(model, pictures, method=method, smooth=smooth, target=TARGET, seed=3)
            found[f"{method} {smooth}"] = summary(heat)
    return found


def cams_last() -> Values:
    """At the network's own CAM layer, where gradcam, hirescam and xgradcam agree; also of the predicted class."""
    model = network("test_resnet", 28)
    predicted = attribution.heatmaps(model, images(2, 28), method="gradcam")
    return _heatmaps(model, [*CAMS, "scorecam"]) | {"gradcam, predicted class": summary(predicted)}


def cams_nchw() -> Values:
    """At an earlier layer, where the gradient differs from place to place."""
    return _heatmaps(network("test_resnet", 28, "layer3"), CAMS, SMOOTH)


def cams_nhwc() -> Values:
    return _heatmaps(network("test_mambaout", 64), CAMS)


def cams_tokens() -> Values:
    """Without gradcam++, whose alpha has a pole where activations are signed: there rounding decides."""
    return _heatmaps(network("test_vit", 64), [*(name for name in CAMS if name != "gradcam++"), "scorecam"])


def gradients() -> Values:
    model = network("test_resnet", 28)
    return _heatmaps(model, GRADIENTS) | _heatmaps(model, ["saliency"], ["gaussian", "flip"])


def averages() -> Values:
    return _heatmaps(network("test_vit", 64), [*AVERAGES, *GRADIENTS])


def relu_networks() -> Values:
    return _heatmaps(network("resnet18", 32), [*RELU, "gradcam"])


def attention() -> Values:
    return _heatmaps(network("test_vit", 64), ATTENTION, ["none", "gaussian", "flip"])


# Batches and runs: recorded with schema 2


def _pool(experiment: Experiment) -> Pool:
    """The first 24 training images of the embedded data; every second one has a map."""
    part = data.load(**EMBEDDED, train_fraction=1.0, folds=5, fold=0, seed=0).train
    positions = torch.arange(0, 24, 2)
    step = proxy.Step(positions=positions, maps=maps("distinct", 12, 4).half())
    pool = proxy.pool(part, experiment, [step])
    return pool.take(torch.cat([torch.arange(24), torch.arange(len(part), len(pool))]))


def batches() -> Values:
    """Order of draws, and what `batch.make` makes of two batches in a row: pixels rounded to 8 bits, and targets."""
    kinds = ("none", "flip", "crop", "rotate", "erase", "cutmix", "mixup", "flip,crop,erase,cutmix,mixup")
    cases = {f"augment {kind}": {"augment": kind, "fill": "none"} for kind in kinds}
    cases |= {f"overlay {overlay}": {"overlay": overlay, "copies": 2} for overlay in ("replace", "append", "withhold")}
    cases |= {f"erase {region}": {"augment": "erase", "erase_region": region} for region in ("attended", "spared")}
    cases["mix by attention"] = {"augment": "cutmix", "mix_labels": "attention", "cutmix_alpha": 0.5, "fill": "none"}
    cases["patch, half the draws"] = {"fill": "patch", "proxy_probability": 0.5}
    cases["noise"] = {"fill": "noise", "weight": 0.5, "threshold_mode": "deviations", "threshold": 1}
    found: Values = {"order": [sha(b) for b in train.batches(50, entries=40, batch_size=16, seed=3, epoch=2)]}
    for name, changes in cases.items():
        e = Experiment(schedule="1,p,1", **changes)
        pool, draws = _pool(e), augment.generators(e.seed, 2)
        for number, index in enumerate(torch.arange(len(pool)).split(16)[:2]):
            raw, labels = pool.part.read(pool.origin[index]), pool.labels[index]
            how = {"classes": 10, "pool": pool, "index": index, "experiment": e, "draws": draws}
            made = batch.make(raw, labels, **how)
            weights = "none" if made.weights is None else sha(made.weights.int())
            exact = not {"rotate", "mixup"} & set(e.augment.split(",")) and e.fill != "noise"
            pixels = sha(masking.to_uint8(made.images).long()) if exact else summary(made.images)
            targets = sha(made.targets) if made.targets.ndim == 1 else rounded(made.targets.amax(1))
            found[f"{name}, batch {number}"] = {"pixels": pixels, "targets": targets, "weights": weights}
    return found


def runs() -> Values:
    """Tiny runs: the identity holds exactly, what was selected too, accuracies within an image."""
    cases = {
        "proxies": {"schedule": "1,p,1"},
        "events": {"schedule": "1,p,1,x0.5,l0.5,c,1", "overlay": "append", "permute_maps": True, "select": "random"},
        "thesis": {"schedule": "1,p,1", "protocol": "thesis", "train_fraction": 0.2},
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, changes in cases.items():
            usual = {"train_fraction": 0.1, "device": "cpu", "precision": "fp32", "runs_dir": folder}
            done = experiment.run(Experiment(**{**usual, **changes}), log=lambda _: None)
            chosen = json.loads(done.proxies(1)["id"].sort_values().to_json(orient="values"))
            identity = {"digest": done.manifest["digest"], "split": done.manifest["split_digest"]}
            selected = {"selected": sha(chosen)} if changes.get("select") == "random" else {}
            right = round(done.summary["test_accuracy"] * done.summary["n_test"])
            found[name] = identity | selected | {"right": right}
    return found


SECTIONS: dict[str, Callable[[], Values]] = {
    function.__name__: function
    for function in (
        seeds,
        masks,
        feathered,
        fills,
        controls,
        derangements,
        scores,
        selections,
        splits,
        cams_last,
        cams_nchw,
        cams_nhwc,
        cams_tokens,
        gradients,
        averages,
        relu_networks,
        attention,
        batches,
        runs,
    )
}


def read() -> dict[str, Values]:
    return json.loads(VALUES.read_text(encoding="utf-8"))


def record(*sections: str) -> None:
    """Compute these sections anew and write them beside the others, a case per line."""
    unknown = set(sections) - SECTIONS.keys()
    if unknown:
        raise SystemExit(f"there is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    values = (read() if VALUES.is_file() else {}) | {name: SECTIONS[name]() for name in sections}
    texts = []
    for name in (name for name in SECTIONS if name in values):
        cases = ",\n".join(f"  {json.dumps(case)}: {json.dumps(value)}" for case, value in values[name].items())
        texts.append(f"{json.dumps(name)}: {{\n{cases}\n}}")
    VALUES.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) == 1:
        print("\n".join(SECTIONS))
    record(*sys.argv[1:])
