"""Figures: they show the measured values, in colours with enough contrast."""

import io
import math
import re
from itertools import pairwise

import pytest
from PIL import Image

from dpokit.figures import PALETTE, Figure, Line, draw, is_wide, short, smooth, thin


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize("name", [name for name in PALETTE if name not in ("--paper", "--grid")])
def test_text_and_lines_have_enough_contrast_in_both_schemes(name, scheme):
    low, high = sorted(luminance(PALETTE[each][scheme]) for each in (name, "--paper"))
    assert (high + 0.05) / (low + 0.05) >= (3 if name.startswith("--line") else 4.5)


def test_each_colour_belongs_to_one_variable():
    assert len({light for light, _ in PALETTE.values()}) == len(PALETTE)


def test_thinning_keeps_every_spike_and_the_order_of_steps():
    steps = list(range(100_000))
    values = [math.sin(step / 5000) for step in steps]
    values[31_415], values[77_777] = 50.0, -50.0
    kept_steps, kept = thin(steps, values)
    assert len(kept) <= 2 * 360
    assert (kept[kept_steps.index(31_415)], kept[kept_steps.index(77_777)]) == (50.0, -50.0)
    assert all(step < after for step, after in pairwise(kept_steps))


def test_thinning_keeps_a_gap_without_finite_values():
    steps = list(range(10_000))
    values = [None if 4000 <= step < 6000 else 1.0 for step in steps]
    kept = dict(zip(*thin(steps, values), strict=True))
    assert {value for step, value in kept.items() if 4100 <= step < 5900} == {None}
    assert None not in {value for step, value in kept.items() if not 4000 <= step < 6000}


def test_a_short_series_is_unchanged():
    assert thin([1, 5, 9], [0.1, None, 0.3]) == ([1, 5, 9], [0.1, None, 0.3])


def test_the_running_mean_averages_a_centred_window():
    values = [float(at % 7) for at in range(400)]
    means = smooth(values)
    assert means[200] == pytest.approx(sum(values[195:206]) / 11)
    assert means[0] == pytest.approx(sum(values[:6]) / 6)


def test_the_running_mean_ignores_values_that_are_not_finite():
    assert smooth([1.0, None, 3.0]) == [2.0, 2.0, 2.0]
    assert smooth([None] * 9) == [None] * 9


def test_the_svg_has_no_colours_addresses_or_styles():
    figure = Figure("loss", "Loss", [Line("a", [1, 2], [0.7, 0.6]), Line("b", [1, 2], [0.7, 0.5], 1)], 0.69, "ln 2")
    svg = draw(figure, software="test").svg
    assert svg.startswith("<svg viewBox=")
    assert not re.search(r"#[0-9a-f]{6}|http|<style|<\?xml|<!|DejaVu| id=\"line", svg)
    assert {"var(--line-0)", "var(--line-1)", "var(--muted)"} <= set(re.findall(r"var\([^)]*\)", svg))


def test_labels_are_escaped_text():
    figure = Figure(
        "loss", "a < b", [Line(f"{name}", [1, 2], [1, 2]) for name in ("$\\frac$", "<script>", "_x", "日本")]
    )
    drawing = draw(figure, software="test")
    assert "&lt;script&gt;" in drawing.svg
    assert "<script" not in drawing.svg
    assert all(name in drawing.svg for name in ("$\\frac$", "日本"))


def test_the_png_names_its_software_and_describes_the_figure():
    drawing = draw(Figure("loss", "Loss", [Line("a", [1], [0.7])]), software="made for a test")
    picture = Image.open(io.BytesIO(drawing.png))
    assert picture.size == pytest.approx((920, 580), abs=1)  # matplotlib 3.10 rounds a width down
    assert picture.text["Software"] == "made for a test"
    assert picture.text["Description"] == drawing.alt


def test_a_line_of_one_point_is_visible():
    picture = Image.open(io.BytesIO(draw(Figure("a", "", [Line("", [5], [1.0])]), software="").png)).convert("RGB")
    assert (0x00, 0x68, 0xA8) in {colour for _, colour in picture.getcolors(100_000)}


def test_a_value_that_is_not_finite_is_marked_at_the_bottom():
    steps = list(range(30))
    whole, torn = (
        draw(Figure("a", "", [Line("", steps, values)]), software="").svg
        for values in ([1.0] * 30, [1.0] * 10 + [None] + [1.0] * 19)
    )
    assert torn.count("<use") == whole.count("<use") + 1


def test_raw_values_are_drawn_only_for_few_lines():
    steps = list(range(100))
    few, many = (
        draw(Figure("a", "", [Line("x", steps, [0.5] * 100, noisy=True)] * count), software="").svg for count in (4, 5)
    )
    assert few.count("stroke-opacity: 0.35") == 4
    assert "stroke-opacity" not in many


def test_the_alternative_text_has_the_numbers():
    line = Line("evaluation", [10, 20, 30], [0.69, 0.51, None])
    alt = draw(Figure("loss", "Loss", [line], 0.693, "ln 2", restarts=[(15, None)]), software="").alt
    for part in ("0.69 at step 10", "lowest 0.51 at step 20", "ln 2", "Restarts at step 15"):
        assert part in alt


def test_a_figure_without_finite_values_is_drawn():
    assert "no finite value" in draw(Figure("a", "A", [Line("x", [1, 2], [None, None])]), software="").alt


@pytest.mark.parametrize(
    ("value", "text"),
    [(12000, "12,000"), (0.05, "0.05"), (2e-5, "2e-5"), (-1234.0, "-1,234"), (0, "0"), (2.5e7, "2.5e7")],
)
def test_ticks_are_short(value, text):
    assert short(value) == text


def test_only_positive_values_with_an_outlier_are_wide():
    assert is_wide([1.0, 1.1, None, 400.0])
    assert not is_wide([1.0, 1.1, 2.0])
    assert not is_wide([0.0, 1.0, 400.0])
    assert not is_wide([None])
