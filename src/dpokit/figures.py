"""Draws lines over steps as a PNG, and as an SVG that takes its colours from the page. No torch.

Pure functions from plain values to text and bytes. matplotlib draws each figure once, in the light colours. The PNG
keeps them; in the SVG each colour becomes a CSS variable (`PALETTE`), so that a page can have a dark scheme.
"""

import io
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

# CSS variable -> (light, dark). The contrast to the background is at least 3 for lines and 4.5 for text; lines of
# several runs also differ by dash and marker (DASHES, MARKERS).
PALETTE = {
    "--paper": ("#ffffff", "#16191d"),
    "--ink": ("#1b1f24", "#e8eaed"),
    "--muted": ("#59616c", "#a4adb8"),
    "--grid": ("#dfe3e8", "#30363d"),
    "--line-0": ("#0068a8", "#5ab4f0"),
    "--line-1": ("#c44e00", "#f59145"),
    "--line-2": ("#007a5b", "#3fc9a0"),
    "--line-3": ("#a63d87", "#e58fc7"),
    "--line-4": ("#8a6700", "#e0c04a"),
    "--line-5": ("#4a4fb8", "#a5a8f7"),
    "--line-6": ("#b3123b", "#ff8296"),
    "--line-7": ("#5b5b5c", "#bdbdbe"),
}
LINES = [light for name, (light, _) in PALETTE.items() if name.startswith("--line")]
DASHES: Sequence[Any] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

WIDTH_INCHES, HEIGHT_INCHES, LEGEND_ROW_INCHES = 4.6, 2.9, 0.185
LEGEND_FONT_POINTS = 9.5
HANDLE_POINTS = 42.0  # width of a legend entry without its label
COLUMNS = 360  # width of a plot on a page in pixels; a line needs at most two points for each
NOISY_FROM_POINTS = 40
MOST_RAW_LINES = 4  # more would hide each other
SETTINGS = {
    "font.size": 10.0,
    "svg.fonttype": "none",  # keep text as text: a reader can search it, a screen reader can read it
    "text.parse_math": False,  # a run's name may hold dollar signs
    "text.color": PALETTE["--ink"][0],
    "axes.edgecolor": PALETTE["--muted"][0],
    "axes.labelcolor": PALETTE["--muted"][0],
    "xtick.color": PALETTE["--muted"][0],
    "ytick.color": PALETTE["--muted"][0],
    "grid.color": PALETTE["--grid"][0],
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Line:
    """One line of a figure.

    Attributes:
        label: text of the legend.
        steps: in ascending order.
        values: one for each step; None for a value that is not finite.
        style: index of colour, dash and marker.
        dots: whether each value has a marker, as for evaluations.
        noisy: whether a long line is drawn pale below its running mean; with more than MOST_RAW_LINES such lines, only
            the means are drawn.
    """

    label: str
    steps: Sequence[int]
    values: Sequence[float | None]
    style: int = 0
    dots: bool = False
    noisy: bool = False


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        key: used in file names; unique on a page.
        title: with the unit.
        lines: at least one.
        level, level_label: height and label of a horizontal reference line; None for no line.
        restarts: (step, style); style None draws a vertical line, a number a marker in the colour of that line.
        log: whether the vertical axis is logarithmic, which needs values above 0.
        across: name and unit of the horizontal axis. With another one than `step`, the figure is a histogram: the
            steps are the beginnings of its bins.
    """

    key: str
    title: str
    lines: Sequence[Line]
    level: float | None = None
    level_label: str = ""
    restarts: Sequence[tuple[int, int | None]] = ()
    log: bool = False
    across: str = "step"

    @property
    def is_histogram(self) -> bool:
        """Whether the lines are counts of bins."""
        return self.across != "step"


@dataclass(frozen=True)
class Drawing:
    """A drawn figure: `svg` for a page that sets PALETTE's variables, `png`, and the alternative text `alt`."""

    figure: Figure
    svg: str
    png: bytes
    alt: str


def draw(figure: Figure, *, software: str) -> Drawing:
    """Draws a figure. `software` is written into the PNG, by which dpokit recognises its own files."""
    labels = [line.label for line in figure.lines]
    columns = 2 if max(_text_points(label) for label in labels) + HANDLE_POINTS < WIDTH_INCHES * 72 / 2 else 1
    legend = math.ceil(len(labels) / columns) if len(labels) > 1 else 0
    height = HEIGHT_INCHES + legend * LEGEND_ROW_INCHES
    alt = describe_figure(figure)
    svg, png = io.StringIO(), io.BytesIO()
    settings: Any = {**SETTINGS, "svg.hashsalt": figure.key}  # makes ids unique on the page
    with rc_context(settings), warnings.catch_warnings():
        # A run's name may hold letters that matplotlib's font lacks; the page's font has them.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        canvas = Canvas(figsize=(WIDTH_INCHES, height), facecolor=PALETTE["--paper"][0])
        bottom = (0.5 + legend * LEGEND_ROW_INCHES) / height
        axes = canvas.add_axes((0.145, bottom, 0.80, 1 - bottom - 0.32 / height), facecolor="none")
        handles = _draw_lines(axes, figure)
        _draw_axes(axes, figure)
        if legend:
            canvas.legend(
                handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=LEGEND_FONT_POINTS,
                handlelength=2.6, columnspacing=1.4, labelspacing=0.3, borderaxespad=0.1,
            )  # fmt: skip
        canvas.savefig(svg, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
        canvas.savefig(png, format="png", dpi=200, metadata={"Software": software, "Description": alt})
    return Drawing(figure, _inline(svg.getvalue()), png.getvalue(), alt)


def _draw_lines(axes: Axes, figure: Figure) -> list[Line2D]:
    """Draws all lines; returns their handles for the legend."""
    handles = []
    raw = sum(line.noisy for line in figure.lines) <= MOST_RAW_LINES
    for line in figure.lines:
        colour, marker = LINES[line.style % len(LINES)], MARKERS[line.style % len(MARKERS)]
        steps, values = thin(line.steps, line.values)
        look: dict[str, Any] = {"color": colour, "linestyle": DASHES[line.style % len(DASHES)], "linewidth": 1.6}
        if figure.is_histogram:
            look["drawstyle"] = "steps-post"
        if line.dots or sum(value is not None for value in values) < 3:  # a line with one point would be invisible
            look |= {"marker": marker, "markersize": 4.2 if len(steps) <= NOISY_FROM_POINTS else 2.2, "linewidth": 1.2}
        if line.noisy and len(line.steps) >= NOISY_FROM_POINTS:
            if raw:
                axes.plot(steps, _gaps(values), color=colour, linewidth=0.7, alpha=0.35)
            steps, values = thin(line.steps, smooth(line.values))
        handles += axes.plot(steps, _gaps(values), **look)
        lost = [step for step, value in zip(line.steps, line.values, strict=True) if value is None]
        if lost:  # a value that is not finite has no height, so its mark is at the bottom
            marks, heights = thin(lost, [0.0] * len(lost), columns=80)
            bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot(marks, _gaps(heights), "x", color=colour, markersize=5, **bottom)
    return handles


def _draw_axes(axes: Axes, figure: Figure) -> None:
    axes.set_title(figure.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(figure.across, loc="right", labelpad=0)
    axes.grid(linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=3, labelsize=9.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}" if step < 1e6 else f"{step / 1e6:g} M"))
    if figure.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if figure.level is not None:
        axes.axhline(figure.level, color=PALETTE["--muted"][0], linewidth=1, linestyle=(0, (2, 2)))
        axes.annotate(
            figure.level_label, (1, figure.level), xycoords=axes.get_yaxis_transform(), xytext=(0, 3),
            textcoords="offset points", ha="right", fontsize=9, color=PALETTE["--muted"][0],
        )  # fmt: skip
    for step, style in figure.restarts:
        if style is None:
            axes.axvline(step, color=PALETTE["--muted"][0], linewidth=0.9, linestyle=(0, (1, 2)))
        else:
            bottom: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "clip_on": False}
            axes.plot([step], [0.02], marker="^", markersize=5, color=LINES[style % len(LINES)], **bottom)


def thin(
    steps: Sequence[int], values: Sequence[float | None], *, columns: int = COLUMNS
) -> tuple[list[int], list[float | None]]:
    """The lowest and the highest value of each pixel column, which keeps every spike.

    A column without a finite value gives one None. A short series is returned unchanged.
    """
    if len(steps) <= 2 * columns:
        return list(steps), list(values)
    width = (steps[-1] - steps[0] + 1) / columns
    picked: list[tuple[int, float | None]] = []
    column: list[tuple[int, float | None]] = []
    bounds = [int((step - steps[0]) / width) for step in steps]
    for index, point in enumerate(zip(steps, values, strict=True)):
        column.append(point)
        if index + 1 == len(steps) or bounds[index + 1] != bounds[index]:
            finite = [(value, step) for step, value in column if value is not None]
            ends = sorted({(step, value) for value, step in (min(finite), max(finite))}) if finite else []
            picked += ends or [(column[0][0], None)]
            column = []
    return [step for step, _ in picked], [value for _, value in picked]


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """The running mean of the finite values, over a window of `smooth_points` values; None for an empty window."""
    half = smooth_points(len(values)) // 2
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    means: list[float | None] = []
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        count = counts[high] - counts[low]
        means.append((sums[high] - sums[low]) / count if count else None)
    return means


def smooth_points(points: int) -> int:
    """Window of the running mean: a fortieth of the number of values, odd, at least 5."""
    return max(5, points // 40 | 1)


def describe_figure(figure: Figure) -> str:
    """The alternative text of a figure, for readers who cannot see it."""
    parts = [f"{figure.title}."]
    for line in figure.lines:
        points = [(value, step) for step, value in zip(line.steps, line.values, strict=True) if value is not None]
        if not points:
            parts.append(f"{line.label}: no finite value.")
            continue
        (first, first_step), (last, last_step), low, high = points[0], points[-1], min(points), max(points)
        if figure.is_histogram:
            parts.append(
                f"{line.label}: the highest bar, {high[0]:,.0f}, begins at {high[1]:,} {figure.across}; the bars begin "
                f"at {first_step:,} and end after {last_step:,}."
            )
            continue
        parts.append(
            f"{line.label}: {first:.4g} at step {first_step:,}, {last:.4g} at step {last_step:,}; "
            f"lowest {low[0]:.4g} at step {low[1]:,}, highest {high[0]:.4g} at step {high[1]:,}."
        )
    if figure.level is not None:
        parts.append(f"A horizontal line marks {figure.level_label}.")
    if figure.restarts:
        parts.append(f"Restarts at step {', '.join(f'{step:,}' for step, _ in figure.restarts)}.")
    return " ".join(parts)


def is_wide(values: Sequence[float | None]) -> bool:
    """Whether all values are positive, and spread so far that only a logarithmic axis shows them all."""
    finite = [value for value in values if value is not None]
    return bool(finite) and min(finite) > 0 and max(finite) > 30 * statistics.median(finite)


def short(value: float) -> str:
    """The short label of a tick: 12,000; 0.05; 2e-5."""
    if value != 0 and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.6g}" if abs(value) < 1000 else f"{value:,.0f}"


def css(scheme: int) -> str:
    """PALETTE as CSS declarations; scheme 0 is light, 1 is dark."""
    return " ".join(f"{name}: {colours[scheme]};" for name, colours in PALETTE.items())


def _text_points(label: str) -> float:
    """The width of a legend's label in matplotlib's font, which is wider than most fonts of a page."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        font = FontProperties(size=LEGEND_FONT_POINTS)
        return float(text_to_path.get_text_width_height_descent(label, font, ismath=False)[0])


def _gaps(values: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]


def _inline(svg: str) -> str:
    """Adapts matplotlib's SVG to a page: colours as CSS variables, the page's font, no prolog and no addresses."""
    variables = {light: f"var({name})" for name, (light, _) in PALETTE.items()}
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg).replace("xlink:href=", "href=")
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r"\bfont: ([^\"']*?\d+(?:\.\d+)?px) [^;\"]*", r"font: \1 var(--font)", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b(?=[^<>]*>)", lambda colour: variables.get(colour[0], colour[0]), svg)
    # Two digits are enough: no screen shows a hundredth of a point.
    return re.sub(r" d=\"[^\"]*\"", lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
