"""All plotting: data in, a Figure out; nothing here computes more than what a plot needs (README: Figures).

Colours are Okabe and Ito's, which the colour-blind tell apart; lines differ by their dashes too, and fillings by
their lightness, so that a grey print can be read.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image
from torch import Tensor

from utils import evaluation, files
from utils.errors import UserError
from utils.walk import Walk

BLACK, ORANGE, BLUE, GREEN, VERMILION, SKY, PURPLE, GREY = (
    "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#999999")
LINES = [dict(color=BLUE, linestyle=":"), dict(color=PURPLE, linestyle=(0, (5, 1, 1, 1))),
         dict(color=ORANGE, linestyle=(0, (3, 1))), dict(color=SKY, linestyle="-")]
BOUNDS = {"paper": dict(color=GREEN, linestyle="-."), "tight": dict(color=VERMILION, linestyle="--")}

STYLE = {
    "font.family": "STIXGeneral", "mathtext.fontset": "stix", "font.size": 10, "axes.titlesize": 10.5,
    "axes.labelsize": 10, "xtick.labelsize": 9, "ytick.labelsize": 9, "legend.fontsize": 9, "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7, "xtick.major.width": 0.7,
    "ytick.major.width": 0.7, "xtick.major.size": 3, "ytick.major.size": 3, "lines.linewidth": 1.4,
    "lines.solid_capstyle": "butt", "figure.dpi": 110, "pdf.fonttype": 42,
}
styled = matplotlib.rc_context(STYLE)       # as a decorator


@styled
def save(fig: Figure, stem: str | Path) -> list[Path]:
    """stem.png and stem.pdf, each whole or not at all; the same figure gives the same bytes."""
    png, pdf = f"{stem}.png", f"{stem}.pdf"
    files.check_writable(png, pdf)
    stamps = {"CreationDate": None, "Producer": None}
    return [files.write(png, lambda file: small_png(fig, file)),
            files.write(pdf, lambda file: fig.savefig(file, format="pdf", metadata=stamps))]


def small_png(fig: Figure, file, dpi: int = 200) -> None:
    """A third of the bytes: a palette of 256 colours, more than these plots have but for antialiasing."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=dpi)
    Image.open(buffer).convert("RGB").quantize(256).save(file, format="png", optimize=True, dpi=(dpi, dpi))


@styled
def two_moons(grids: Mapping[str, tuple[Tensor, Tensor]], x: Tensor, y: Tensor) -> Figure:
    """Figure 1: title -> confidence and margin [n, n] on the unit square, and the points x [N, 2], y [N].

    Filled contours of the confidence from 0.5 to 1; the dashed line is where the margin changes its sign.
    """
    fig = Figure(figsize=(3.1 * len(grids) + 0.8, 3.45), layout="compressed")
    panels = fig.subplots(1, len(grids), sharey=True, squeeze=False)[0]
    for ax, (title, (confidence, margin)) in zip(panels, grids.items(), strict=True):
        axis = torch.linspace(0, 1, len(confidence)).numpy()
        filled = ax.contourf(axis, axis, confidence.clamp(0.5, 1).numpy(), torch.linspace(0.5, 1, 26).numpy(),
                             cmap="Blues", vmin=0.5, vmax=1.1)
        filled.set_edgecolor("face")        # no hairlines between the levels in a pdf
        for moon, marker, face, edge, size in ((0, "o", ORANGE, BLACK, 7), (1, "^", "white", BLACK, 8)):
            ax.scatter(*x[y == moon].T.numpy(), s=size, marker=marker, c=face, edgecolors=edge, linewidths=0.35)
        ax.contour(axis, axis, margin.numpy(), [0.0], colors=BLACK, linewidths=1.4, linestyles="--")
        ax.set(title=title, xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=(0, 0.5, 1), yticks=(0, 0.5, 1),
               xlabel="$x_1$")
        for each in (ax.xaxis, ax.yaxis):
            each.set_major_formatter("{x:g}")
        ax.spines[:].set_visible(True)
    panels[0].set_ylabel("$x_2$", rotation=0, labelpad=9)
    bar = fig.colorbar(filled, ax=panels, ticks=(0.5, 0.6, 0.7, 0.8, 0.9, 1), pad=0.03, aspect=28, label="confidence")
    bar.outline.set_linewidth(0.7)
    return fig


@styled
def worst_cases(backup: dict, rows: Sequence[int]) -> Figure:
    """Figure 2: for each seed of `rows` the seed, and every method's worst image in the ball around it.

    Below the seed its radius; below an image its predicted class, unless all classes are equally likely, and the
    score on the seed -> on the image, as a confidence where it is one.
    """
    n = len(backup["seeds"])
    if missing := [row for row in rows if not 0 <= row < n]:
        raise UserError(f"there is no seed {missing[0]}: this attack has the seeds 0 to {n - 1}")
    labels = list(backup["models"])
    blocks = math.ceil(len(labels) / 10)        # of methods, below each other: ten images fill a page's width
    width = math.ceil(len(labels) / blocks)
    fig = Figure(figsize=(0.98 * (1 + width) + 0.1, (1.34 * len(rows) + 0.22) * blocks), layout="compressed")
    panels = fig.subplots(blocks * len(rows), 1 + width, squeeze=False)
    for k, grid in enumerate(panels.reshape(blocks, len(rows), 1 + width)):
        block = labels[k * width:][:width]
        for ax, title in zip(grid[0], ["seed", *block], strict=False):
            ax.set_title(textwrap.fill(title, 14), pad=4)
        for ax in grid[:, 1 + len(block):].flat:
            ax.set_axis_off()
        for row, i in zip(grid, rows, strict=True):
            image(row[0], backup["seeds"][i], f"$R$ = {backup['radii'][i]:.3g}")
            for ax, label in zip(row[1:], block, strict=False):
                image(ax, backup["models"][label]["samples"][i], prediction(backup, label, i))
    return fig


def prediction(backup: dict, label: str, i: int) -> str:
    """What stands below a method's image of seed i."""
    attacked = backup["models"][label]
    scores = [attacked[key][i].item() for key in ("seed_score", "score")]
    predicted = f"class {attacked['prediction'][i]}"
    if not backup["meta"][label]["score_is_confidence"]:
        return "{}\nscore {:.3g}\n→ {:.3g}".format(predicted, *scores)     # in three lines: -3.91e-05 is long
    if math.isclose(scores[1], -math.log(backup["classes"]), abs_tol=1e-6):     # up to float32's rounding
        predicted = "no class"
    return "{}\n{:.1f} → {:.1f} %".format(predicted, *(100 * torch.tensor(scores).exp()))


def image(ax, pixels: Tensor, text: str) -> None:
    """One image [C, H, W] in [0, 1] without axes, and a text below it."""
    shown = pixels.permute(1, 2, 0) if len(pixels) == 3 else pixels[0]
    ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
    ax.set(xticks=(), yticks=())
    ax.spines[:].set_visible(True)
    ax.set_xlabel(text, fontsize=8.5, labelpad=3, linespacing=1.15)


@styled
def radii(panels: Mapping[str, Tensor]) -> Figure:
    """Figure 3: title -> the radii [N] of the attack's seeds; a histogram each."""
    fig = Figure(figsize=(3.3 * len(panels) + 0.2, 2.5), layout="constrained")
    for ax, (title, radius) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        ax.hist(radius.numpy(), bins=20, color=SKY, edgecolor="white", linewidth=0.6)
        median = evaluation.median(radius)
        ax.axvline(median, color=BLACK, linestyle="--", linewidth=1.1)
        ax.annotate(f"median {median:.4g}", (median, 1), xycoords=("data", "axes fraction"), xytext=(4, -1),
                    textcoords="offset points", va="top", fontsize=9)
        ax.set(title=title, xlabel="certified radius $R$ (units of the metric)", ylabel="number of seeds")
        ax.margins(y=0.14)
    return fig


@styled
def confidences(methods: Mapping[str, Mapping[str, Tensor]], classes: int, bins: int = 45) -> Figure:
    """label -> set -> confidences [N]: one panel a method, one histogram a set, each as high as its highest bin.

    The number beside a histogram is the mean in percent.  The first set is the in-distribution's, the last the
    adversarial noise; those between are OOD sets.
    """
    names = list(next(iter(methods.values())))
    columns = min(4, len(methods))
    rows = -(-len(methods) // columns)
    colours = [BLACK, *[BLUE] * (len(names) - 2), VERMILION]
    fig = Figure(figsize=(1.85 * columns + 1.5, (0.36 * len(names) + 0.4) * rows + 0.5), layout="constrained")
    grid = fig.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    edges = torch.linspace(1 / classes, 1, bins + 1, dtype=torch.float64)
    for ax, (label, sets) in zip(grid.flat, methods.items(), strict=False):
        for base, name, colour in zip(range(len(names) - 1, -1, -1), names, colours, strict=True):
            counts, _ = torch.histogram(sets[name].double().clamp(edges[0], edges[-1]), edges)
            ax.stairs((base + 0.8 * counts / counts.max()).numpy(), edges.numpy(), baseline=base, fill=True,
                      color=colour)
            ax.axhline(base, color=GREY, linewidth=0.5, zorder=0)
            ax.annotate(f"{100 * sets[name].mean():.1f}", (1, base + 0.28), xycoords=("axes fraction", "data"),
                        xytext=(4, 0), textcoords="offset points", fontsize=8.5, va="center")
        ax.annotate("mean", (1, 1), xycoords="axes fraction", xytext=(4, -1), textcoords="offset points", fontsize=8.5,
                    style="italic", va="center")
        ax.set(title=textwrap.fill(label, 20), xlim=(1 / classes, 1), ylim=(0, len(names)))
        ax.set_xticks(sorted({1 / classes, 0.5, 1}))
        ax.set_yticks([base + 0.28 for base in range(len(names) - 1, -1, -1)], names)
        ax.tick_params(axis="y", length=0)
        ax.spines[["left"]].set_visible(False)
        ax.xaxis.set_major_formatter(PercentFormatter(1, symbol="", decimals=0))
    panels = list(grid.flat)
    for ax in panels[len(methods) - columns:len(methods)]:      # each column's lowest
        ax.tick_params(labelbottom=True)
    for ax in panels[len(methods):]:
        ax.set_axis_off()
    fig.supxlabel("confidence (%)", fontsize=10)
    return fig


@styled
def certificate(way: Walk, label: str, shown: int = 7) -> Figure:
    """Left: confidences on the way from a test image (distance 0) out to noise, and the bounds certified on the ball
    around the noise.  Right: the radius certified around each point.  Below: images on the way.
    """
    others = [name for name in way.confidence if name != label]
    if len(others) > len(LINES):
        raise UserError(f"{len(others)} models beside {label}: choose at most {len(LINES)}, to tell their lines apart")
    pictures = 1.4 + 0.2 * len(way.confidence)      # a line of text for each
    fig = Figure(figsize=(8.2, 2.7 + pictures), layout="constrained")
    top, bottom = fig.subfigures(2, 1, height_ratios=(2.7, pictures))
    left, right = top.subplots(1, 2, width_ratios=(1.3, 1))
    d, end = way.distance.numpy(), way.distance[-1].item()
    chosen = torch.linspace(0, len(d) - 1, shown).round().int().tolist()
    looks = dict(zip(others, LINES, strict=False))
    looks[label] = dict(color=BLACK, linewidth=2.4)
    for name, confidence in way.confidence.items():
        left.plot(d, confidence.numpy(), **looks[name], marker="o", markevery=chosen, markersize=3.5, label=name,
                  clip_on=False)
    for method, bound in way.bound.items():
        left.plot(d, bound.numpy(), **BOUNDS[method], label=f"certified, {method}")
    for method, radius in way.radius.items():
        right.plot(d, radius.numpy(), **BOUNDS[method])
    right.axline((0, 0), slope=1, color=GREY, linewidth=0.9, zorder=0)
    right.text(end / 2, end / 2, "radius = distance", color="#666666", fontsize=9, ha="center", va="bottom",
               rotation=45, rotation_mode="anchor", transform_rotates_text=True)
    for ax in (left, right):
        ax.set(xlim=(0, end), xlabel="distance $d$ from the test image (units of the metric)")
    left.set(ylim=(0, 1.03), ylabel="confidence (%)", yticks=(0, 0.25, 0.5, 0.75, 1))
    left.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    right.set(ylim=(0, end), ylabel="certified radius\n(units of the metric)")
    top.legend(loc="outside upper center", ncols=min(6, len(left.lines)), handlelength=2.8)
    for ax, i in zip(bottom.subplots(1, shown), chosen, strict=True):
        text = [f"{name} {100 * confidence[i]:.1f} %" for name, confidence in way.confidence.items()]
        best = min(bound[i].item() for bound in way.bound.values())
        image(ax, way.images[i], "\n".join([*text, f"certified ≤ {math.ceil(1e4 * best) / 100:.2f} %"]))
        ax.set_title(f"$d$ = {d[i]:.1f}", fontsize=9, pad=3)
    return fig
