"""Draw a pipeline schedule, with the fraction of the step in which ranks are idle and their peak numbers of activations.

    python tools/draw_schedule.py --schedule zb-h1 --stages 4 --microbatches 8 --costs 1,1,1,0 --output zb-h1.svg

The costs are the times of one action of one chunk, in any unit: F forward, B input gradient, W weight gradient (B + W is the
time of a backward that the schedule does not split), COMM sending a result to another rank.

Exit status: 0 done; 2 invalid schedule or costs, or the output must not be written there; 1 writing failed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # import this checkout even if it is not installed

from megatron.launch.entry import loading, run_main

with loading():
    from megatron.files.outputs import OutputError, check_picture
    from megatron.files.pending import write_whole
    from megatron.launch.tool_parser import ToolParser, non_empty_path
    from megatron.pipeline.schedules.draw import Panel, draw_svg, draw_text
    from megatron.pipeline.schedules.schedule import SCHEDULES, Schedule, make_schedule
    from megatron.pipeline.schedules.simulate import Costs, Timeline, simulate


def parse_costs(text: str) -> Costs:
    """Parse "F,B,W,COMM"; ValueError unless they are four finite numbers of 0 or more."""
    try:
        forward, backward, weight, communication = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--costs {text}: give four numbers F,B,W,COMM, for example 1,1,1,0") from None
    return Costs(forward, backward, weight, communication)


def describe_timeline(schedule: Schedule, timeline: Timeline) -> dict[str, object]:
    """Return the schedule's sizes and simulated times as the JSON object that --json prints."""
    return {
        "schedule": schedule.name,
        "stages": schedule.ranks,
        "microbatches": schedule.micro_batches,
        "chunks": schedule.stages // schedule.ranks,
        "bubble_rate": timeline.bubble_rate,
        "bubble_per_rank": list(timeline.bubble_per_rank),
        "peak_activations": list(timeline.peak_activations),
        "makespan": timeline.makespan,
    }


def main() -> int:
    """Run the tool, and return its exit status."""
    parser = ToolParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", required=True, help=", ".join(SCHEDULES))
    parser.add_argument("--stages", type=int, required=True, metavar="P", help="pipeline ranks")
    parser.add_argument("--microbatches", type=int, required=True, metavar="M", help="micro-batches of a step")
    parser.add_argument("--chunks", type=int, metavar="V", help="stages of each rank; default the schedule's own number, or 2")
    parser.add_argument("--costs", default="1,1,1,0", metavar="F,B,W,COMM", help="times of one action; default 1,1,1,0")
    parser.add_argument("--output", type=non_empty_path, metavar="FILE", help="write an SVG instead of drawing in the terminal")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of drawing in the terminal")
    args = parser.parse_args()
    try:
        schedule = make_schedule(args.schedule, args.stages, args.microbatches, args.chunks)
        timeline = simulate(schedule, parse_costs(args.costs))
        if not math.isfinite(timeline.makespan):  # the sum of finite costs can be infinite
            raise ValueError(f"--costs {args.costs} are too large: their sum is not finite")
        if args.output is not None:
            title = f"{schedule.name}, costs {args.costs}"
            check_picture("--output", args.output)
            args.output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.output, draw_svg([Panel(title, schedule, timeline)]))
    except (ValueError, OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(describe_timeline(schedule, timeline), indent=1))
    elif args.output is None:
        print(draw_text(schedule, timeline, max(40, shutil.get_terminal_size((120, 24)).columns)))
    else:
        print(f"{args.output}: bubble rate {timeline.bubble_rate:.4f}, makespan {timeline.makespan:.6g}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
