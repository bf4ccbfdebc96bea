"""Draw the loss curve of a metrics file as SVG.

    python tools/plot_metrics.py runs/quickstart/checkpoints/metrics.jsonl --output loss.svg

Reads the JSON lines that training appends: lines with `iteration` and `lm_loss` are training losses, or evaluations if they
also have `split`.
"""

from __future__ import annotations

import argparse
import math
import sys
from html import escape
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.files.outputs import OutputError, check_picture
    from megatron.files.pending import write_whole
    from megatron.files.regular import MAX_METRICS_BYTES, parse_json, read_text
    from megatron.launch.tool_parser import ToolParser, non_empty_path

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 48, 52
INK, FAINT, TRAIN, VALIDATION = "#1f2933", "#d9dee4", "#2b6cb0", "#d9480f"
Points = list[tuple[float, float]]


class MetricsError(Exception):
    """The file cannot be drawn; the message gives the reason."""


def read_losses(path: Path) -> tuple[Points, Points]:
    """Read the training and validation points, (iteration, loss), each sorted by iteration.

    A later line for the same iteration replaces the earlier one, since a resumed run repeats iterations.

    Raises:
        MetricsError: the file is missing, is not JSON lines, or has no training loss.
    """
    try:
        text = read_text(path, MAX_METRICS_BYTES)
    except OSError as error:
        raise MetricsError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MetricsError(f"{path} is not a text file in UTF-8: {error}") from error
    lines = text.split("\n")  # the last one is empty, or an incomplete write
    train: dict[float, float] = {}
    validation: dict[float, float] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise MetricsError(f"{path}:{number} is not a JSON object: {error}") from error
        if not isinstance(record, dict):
            raise MetricsError(f"{path}:{number} is not a JSON object")
        iteration, loss = record.get("iteration"), record.get("lm_loss")
        if not isinstance(iteration, int | float) or not isinstance(loss, int | float) or not math.isfinite(loss):
            continue
        if "split" not in record:
            train[iteration] = loss
        elif record["split"] == "validation":
            validation[iteration] = loss
    if not train:
        raise MetricsError(f"{path} has no training loss (no line with `iteration` and `lm_loss`)")
    return sorted(train.items()), sorted(validation.items())


def choose_ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers, 1, 2 or 5 times a power of ten apart.

    Args:
        low: lower limit of the numbers.
        high: upper limit of the numbers.
        count: approximate number of numbers.
    """
    if high <= low:
        return [low]
    min_step = (high - low) / count
    power = 10.0 ** math.floor(math.log10(min_step))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= min_step)
    first = math.ceil(low / step - 1e-9)  # the tolerance keeps the numbers at both limits in spite of rounding
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw_losses(train: Points, validation: Points, title: str) -> str:
    """Return an SVG picture of the curves.

    Args:
        train: training losses, at least one.
        validation: validation losses; may be empty.
        title: heading of the picture.
    """
    all_points = train + validation
    x_low, x_high = 0.0, max(x for x, _ in all_points)
    y_low, y_high = min(y for _, y in all_points), max(y for _, y in all_points)
    margin = 0.06 * (y_high - y_low) or 0.5  # for a flat curve
    y_low, y_high = max(0.0, y_low - margin), y_high + margin

    def at_x(x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((x - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def at_y(y: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (y - y_low) / (y_high - y_low)

    def path(points: Points) -> str:
        return " ".join(f"{'M' if i == 0 else 'L'}{at_x(x):.1f} {at_y(y):.1f}" for i, (x, y) in enumerate(points))

    def label(x: float, y: float, text: str, **attributes: str) -> str:
        more_attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in attributes.items())
        return f'<text x="{x:.1f}" y="{y:.1f}" fill="{INK}"{more_attributes}>{escape(text)}</text>'

    def line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"/>'

    def dot(x: float, y: float, color: str) -> str:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>'

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        label(LEFT, 26, title, font_size="15"),
    ]
    for y in choose_ticks(y_low, y_high, 6):
        out += [line(LEFT, at_y(y), right, at_y(y), FAINT), label(LEFT - 8, at_y(y) + 4, f"{y:g}", text_anchor="end")]
    for x in choose_ticks(x_low, x_high, 8):
        out += [line(at_x(x), bottom, at_x(x), bottom + 5, INK), label(at_x(x), bottom + 20, f"{x:g}", text_anchor="middle")]
    out.append(line(LEFT, bottom, right, bottom, INK))
    out.append(label((LEFT + right) / 2, HEIGHT - 12, "iteration", text_anchor="middle"))
    middle = (TOP + bottom) / 2
    out.append(label(18, middle, "loss (nats per token)", text_anchor="middle", transform=f"rotate(-90 18 {middle:.1f})"))
    curves = [("training", train, TRAIN, ""), ("validation", validation, VALIDATION, ' stroke-dasharray="5 3"')]
    for row, (name, points, color, dashes) in enumerate(curve for curve in curves if curve[1]):
        out.append(f'<path d="{path(points)}" fill="none" stroke="{color}" stroke-width="1.6"{dashes}/>')
        if dashes or len(points) == 1:  # mark the few evaluations, and a single point, which has no line
            out += [dot(at_x(x), at_y(y), color) for x, y in points]
        y = TOP + 18 + 20 * row
        out += [dot(right - 168, y - 4, color), label(right - 156, y, f"{name}, last {points[-1][1]:.3f}")]
    return "\n".join([*out, "</svg>"]) + "\n"


def main() -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("metrics", type=non_empty_path, help="metrics.jsonl of a run")
    parser.add_argument("--output", type=non_empty_path, required=True, help="SVG file to write")
    parser.add_argument("--title", default="Loss", help="heading of the picture")
    arguments = parser.parse_args()
    try:
        train, validation = read_losses(arguments.metrics)
        check_picture("--output", arguments.output, [arguments.metrics])
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, draw_losses(train, validation, arguments.title))
    except (MetricsError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {arguments.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"{arguments.output}: {len(train)} training and {len(validation)} validation points")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
