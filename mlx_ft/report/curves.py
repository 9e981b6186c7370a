"""Charts as inline SVG: training curves, scores, survival, row lengths.

Does: draw with matplotlib's SVG backend (no pyplot, no global state). Remove everything that an
inline, themable, reproducible picture must not have: prolog, ids, fonts, fixed colours.
Does not: extrapolate, or show a smoothed curve without the raw one. A long training curve is
averaged over reports, and says so.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mlx_ft.runs.document import is_report, ordered_columns
from mlx_ft.text.quantities import compact, is_number
from mlx_ft.text.safe import one_line

WIDTH = 420  # px at full size; the page may show a chart smaller
POINTS_AN_INCH = 72
WIDE_RANGE = 50.0  # highest / lowest loss from which a linear axis would hide the lower end
MAX_POINTS = 400
MARKED_POINTS = 40
SMOOTHED_FROM = 20  # points from which a smoothed line tells more than the raw one
SMOOTHED_SHARE = 0.05  # of the curve, over which it forgets
BELOW_ZERO = -0.1  # where a survival below zero is drawn: noise is larger than what was learned
# matplotlib colour -> CSS variable of the page, with the colour for a picture taken out of it.
# The hues are Okabe and Ito's colour-blind safe ones (2008), darkened where thin lines need it.
INK, GRID = "#010101", "#020202"
COLUMN_COLOURS = {
    "base": "#030303",
    "adapter": "#040404",
    "fused": "#050505",
    "quantized": "#060606",
}
PALETTE = {
    INK: "var(--ink,#20262c)",
    GRID: "var(--rule,#d9dee2)",
    "#030303": "var(--base,#78828b)",
    "#040404": "var(--adapter,#0072b2)",
    "#050505": "var(--fused,#00835f)",
    "#060606": "var(--quantized,#c95a00)",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mlx-ft",
    "font.size": 11.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.linewidth": 0.8,
    "grid.color": GRID,
    "legend.frameon": False,
    "legend.fontsize": 11.5,
    "lines.linewidth": 1.6,
    **dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    ),
}


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Return training and validation loss over iterations, or None when there is no point.

    The axis starts at 0, and is logarithmic when the highest loss is over 50 times the lowest.
    """
    train = _points(metrics, "loss", is_report)
    validation = _points(metrics, "loss", lambda line: line.get("kind") == "validation")
    losses = [value for _, value in (*train, *validation)]
    if not losses:
        return None
    train, grouped = averaged(train)
    with _chart("loss", "Training and validation loss over iterations", 270) as (axes, out):
        label = f"training (mean of {grouped} reports)" if grouped > 1 else "training"
        smooth = smoothed([value for _, value in train])
        _line(axes, train, COLUMN_COLOURS["adapter"], label, "o", 0.35 if smooth else 1.0)
        if smooth:
            line = [(x, y) for (x, _), y in zip(train, smooth, strict=True)]
            _line(axes, line, COLUMN_COLOURS["adapter"], "smoothed", "")
        _line(axes, validation, COLUMN_COLOURS["quantized"], "validation", "s")
        if min(losses) > 0 and max(losses) / min(losses) > WIDE_RANGE:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(_tick))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_ylabel("loss (logarithmic)")
        else:
            axes.set_ylim(0, 1.05 * max(losses) or 1)
            axes.set_ylabel("loss")
        _iterations(axes)
        _legend(axes, 3 if smooth else 2)
    return out[0]


def smoothed(values: Sequence[float]) -> list[float]:
    """Return the exponential moving average of a curve, corrected for its start.

    A short curve gives nothing.
    """
    if len(values) < SMOOTHED_FROM:
        return []
    kept = 1 - 1 / max(2.0, SMOOTHED_SHARE * len(values))
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = kept * mean + (1 - kept) * value, kept * weight + (1 - kept)
        means.append(mean / weight)
    return means


def plain_curve(
    metrics: Sequence[Mapping[str, Any]], key: str, words: str, unit: str = "", scale: float = 1.0
) -> str | None:
    """Return a quantity of the training reports over iterations, or None without points.

    words: its name.
    unit: the label of its axis.
    scale: divides the values.
    """
    points, grouped = averaged(_points(metrics, key, is_report))
    if not points:
        return None
    points = [(x, y / scale) for x, y in points]
    name = key.replace("_", "-")
    with _chart(name, f"{words} over iterations", 200) as (axes, out):
        _line(axes, points, COLUMN_COLOURS["adapter"], words, "o")
        axes.set_ylim(0, 1.08 * max(value for _, value in points) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        mean = f" (mean of {grouped} reports)" if grouped > 1 else ""
        axes.set_ylabel(f"{unit or words.lower()}{mean}")
        _iterations(axes)
    return out[0]


def selection_curve(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the score of the choosing prompts over iterations, or None without prompts.

    Shows the 95 % interval and marks the chosen weights.
    """
    lines = [line for line in metrics if line.get("kind") == "selection"]
    points = _points(lines, "score", bool)
    if not points:
        return None
    with _chart("selection", "Score of the choosing prompts over iterations", 230) as (axes, out):
        _line(axes, points, COLUMN_COLOURS["adapter"], "score", "o")
        for (x, low), (_, high) in zip(
            _points(lines, "low", bool), _points(lines, "high", bool), strict=False
        ):
            axes.plot([x, x], [low, high], color=INK, linewidth=0.8, alpha=0.5)
        chosen = [point for point in points if point[0] == lines[-1].get("best_iteration")]
        for x, y in chosen:
            label = f"chosen: iteration {x:,.0f}, {y:.2f}"
            colour = COLUMN_COLOURS["quantized"]
            axes.plot([x], [y], marker="D", markersize=7, color=colour, linewidth=0, label=label)
        axes.set_ylim(0, 1.03)
        axes.set_ylabel("score")
        _iterations(axes)
        _legend(axes, 2)
    return out[0]


def learning_rate_curve(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the learning rate over iterations, or None when there is no point."""
    points, _ = averaged(_points(metrics, "learning_rate", is_report))
    if not points:
        return None
    with _chart("learning-rate", "Learning rate over iterations", 200) as (axes, out):
        _line(axes, points, COLUMN_COLOURS["fused"], "learning rate", "o")
        axes.set_ylim(0, 1.08 * max(value for _, value in points) or 1)
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_ylabel("learning rate")
        _iterations(axes)
    return out[0]


def score_bars(name: str, columns: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a suite's mean scores with 95 % intervals: all samples first, then by category.

    name: prefix of the chart's ids.
    columns: `eval.<suite>` of the document.
    """
    names = ordered_columns(columns)
    categories = list(dict.fromkeys(c for n in names for c in columns[n].get("by_category") or {}))
    if not names:
        return None
    thickness = 0.8 / len(names)
    height = 70 + (1 + len(categories)) * (10 + 9 * len(names))
    with _chart(name, "Mean score with 95 % interval, by category", height) as (axes, out):
        for index, column in enumerate(names):
            results: list[Any] = [columns[column]]
            results += [(columns[column].get("by_category") or {}).get(c) for c in categories]
            shift = (index - (len(names) - 1) / 2) * thickness
            rows = [
                (row + shift, result)
                for row, result in enumerate(results)
                if result and is_number(result.get("mean"))
            ]
            _bars(axes, rows, thickness, column)
        labels = ["all", *(one_line(category, 24) for category in categories)]
        axes.set_yticks(range(len(labels)), labels=labels, parse_math=False)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, 1.005)
        axes.set_xlabel("mean score, 95 % interval")
        _legend(axes, len(names))
    return out[0]


def survival_curve(ways: Mapping[str, Sequence[tuple[int, float]]]) -> str | None:
    """Return each way's survival over the layers, or None without points.

    Values below zero are drawn just under it.
    """
    if not ways:
        return None
    styles = ("-", "-", ":", "--", "-.", "-")
    colours = ("fused", "quantized", "base", "base", "base", "base")
    with _chart("survival", "Survival of what was learned, by layer", 260) as (axes, out):
        for index, (name, points) in enumerate(ways.items()):
            axes.plot(
                [number for number, _ in points],
                [max(BELOW_ZERO, kept) for _, kept in points],
                color=COLUMN_COLOURS[colours[index % len(colours)]],
                linestyle=styles[index % len(styles)],
                marker="o",
                markersize=3,
                label=one_line(name, 24),
            )
        axes.set_ylim(BELOW_ZERO - 0.02, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel("layer of the model")
        axes.set_ylabel("survival")
        _legend(axes, 3)
    return out[0]


def length_histogram(split: Mapping[str, Any]) -> str | None:
    """Return the histogram of row lengths of `data.splits.<split>`, with the median marked."""
    histogram = split.get("histogram") or {}
    edges, counts = histogram.get("edges") or [], histogram.get("counts") or []
    if not counts or len(edges) != len(counts) + 1:
        return None
    quantiles = split.get("length_quantiles") or {}
    with _chart("lengths", "Histogram of row lengths in tokens", 200) as (axes, out):
        axes.stairs(counts, edges, fill=True, color=COLUMN_COLOURS["base"], alpha=0.75)
        for quantile, style in (("p50", "-"), ("p95", "--")):
            value = quantiles.get(quantile)
            if is_number(value):
                words = {"p50": "median", "p95": "95 % fit in"}[quantile]
                label = f"{words} {value:,.0f}"
                axes.axvline(value, color=INK, linewidth=1.2, linestyle=style, label=label)
        axes.set_xlim(min(0, edges[0]), edges[-1])
        axes.set_xlabel("tokens in a row")
        axes.set_ylabel("rows")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        if axes.get_legend_handles_labels()[0]:
            _legend(axes, 2)
    return out[0]


def averaged(points: list[tuple[float, float]]) -> tuple[list[tuple[float, float]], int]:
    """Return at most MAX_POINTS points, each the mean of `grouped` neighbours, and `grouped`."""
    grouped = -(-len(points) // MAX_POINTS) or 1
    if grouped == 1:
        return points, 1
    groups = [points[start : start + grouped] for start in range(0, len(points), grouped)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ], grouped


@contextmanager
def _chart(name: str, label: str, height: int) -> Iterator[tuple[Axes, list[str]]]:
    """Yield axes to draw on and a list that holds the SVG text afterwards."""
    out: list[str] = []
    with matplotlib.rc_context(), catch_warnings():
        # A letter that matplotlib's own font lacks: the reader's browser draws the text, not we.
        filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        inches = (WIDTH / POINTS_AN_INCH, height / POINTS_AN_INCH)
        figure = Figure(figsize=inches, dpi=POINTS_AN_INCH, layout="constrained")
        yield figure.add_subplot(), out
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        out.append(inline_svg(stream.getvalue(), name, label))


def inline_svg(svg: str, name: str, label: str) -> str:
    """Return matplotlib's SVG document as an element for a page, its ids starting with `name`."""
    svg = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>",
        "",
        svg[svg.index("<svg") :],
        flags=re.DOTALL,
    )
    box = re.search(r'viewBox="([^"]*)"', svg)
    assert box is not None, "matplotlib always writes a viewBox"
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    body = svg[svg.index(">") + 1 :]
    # Only inside of tags: texts are data, and `<` and `>` in them are escaped.
    body = re.sub(r"<[^<>]*>", lambda tag: _tidy_tag(tag[0], name, used), body)
    body = re.sub(r">\s*\n\s*<", "><", body)
    head = f'<svg class="chart" viewBox="{box[1]}" role="img" aria-label="{escape(label)}"'
    return f'{head} stroke-linejoin="round">{body.strip()}'


def _tidy_tag(tag: str, name: str, used: set[str]) -> str:
    """Return a tag with the page's colours and font, two decimals, and only the ids in use."""
    if tag.endswith('style="fill: none"/>'):
        return ""  # a path with neither fill nor stroke: matplotlib's invisible backgrounds
    tag = re.sub(r'\s+id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", tag)
    tag = re.sub(r"url\(#|href=\"#", lambda m: f"{m[0]}{name}-", tag.replace("xlink:href", "href"))
    tag = re.sub(r" font-family: [^;\"]*;?", "", tag)
    tag = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    tag = re.sub(r"#0[1-6]0[1-6]0[1-6]\b", lambda m: PALETTE.get(m[0], m[0]), tag)
    tag = re.sub(r"-?\d+\.\d{2,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), tag)
    return " ".join(tag.split()).replace(' "', '"')


def _points(
    metrics: Sequence[Mapping[str, Any]], key: str, wanted: Callable[[Mapping[str, Any]], bool]
) -> list[tuple[float, float]]:
    return [
        (line["iteration"], line[key])
        for line in metrics
        if wanted(line) and is_number(line.get("iteration")) and is_number(line.get(key))
    ]


def _line(
    axes: Axes,
    points: list[tuple[float, float]],
    colour: str,
    label: str,
    marker: str,
    alpha: float = 1.0,
) -> None:
    if not points:
        return
    mark = marker if len(points) <= MARKED_POINTS else ""
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=colour, label=label, marker=mark, markersize=3.5, alpha=alpha)


def _bars(
    axes: Axes, rows: Sequence[tuple[float, Mapping[str, Any]]], thickness: float, column: str
) -> None:
    if not rows:
        return
    positions = [position for position, _ in rows]
    means = [result["mean"] for _, result in rows]
    colour = COLUMN_COLOURS.get(column, INK)
    axes.barh(
        positions,
        means,
        height=0.88 * thickness,
        color=colour,
        alpha=0.65,
        label=one_line(column, 20),
    )
    for position, result in rows:
        if is_number(result.get("low")) and is_number(result.get("high")):
            ends = [result["low"], result["high"]]
            axes.plot(ends, [position] * 2, color=INK, linewidth=1.0, marker="|", markersize=4)


def _iterations(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("iteration (mini-batches)")


def _legend(axes: Axes, columns: int) -> None:
    figure = axes.figure
    assert isinstance(figure, Figure), "charts have no nested figures"
    figure.legend(
        loc="outside upper left",
        ncols=columns,
        handlelength=1.2,
        columnspacing=1.4,
        borderpad=0.1,
    )


def _tick(value: float, _: int | None) -> str:
    return compact(float(f"{value:.4g}")) if math.isfinite(value) else ""
