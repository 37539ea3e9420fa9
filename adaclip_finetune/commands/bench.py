"""`adaclip bench`: measure how fast this package is on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence

from adaclip_finetune.bench.rows import ROWS
from adaclip_finetune.commands.flags import Parser, a_path, check_inputs, check_outputs, write_output
from adaclip_finetune.config.layers import nearest
from adaclip_finetune.errors import UserError


def run(words: Sequence[str]) -> int:
    """Measure, and print Markdown tables. Return 1 if something is slower than in --compare, else 0.

    Raise UserError.
    """
    arguments = _parser().read(words)
    if unknown := [name for name in arguments.rows if name not in ROWS]:
        raise UserError(f"unknown row {unknown[0]}; did you mean {nearest(unknown[0], ROWS)}?")
    if arguments.turns < 1:
        raise UserError(f"--turns {arguments.turns}: a whole number from 1 up is needed")
    check_inputs({"--compare": [arguments.compare]})
    check_outputs({"--json": arguments.json}, {"--json": ".json"}, [arguments.compare])

    from adaclip_finetune.bench.run import make_setup, read_results, run_rows, slower

    given = arguments.device, arguments.precision, arguments.turns, arguments.quick, arguments.processor_time
    setup = make_setup(*given)
    old = arguments.compare and read_results(arguments.compare, setup)
    found = run_rows(arguments.rows or list(ROWS), setup)
    if arguments.json:
        write_output("--json", arguments.json, json.dumps(found, indent=1))
    if old is None:
        return 0
    lines = slower(old, found)
    print("\n## slower than before\n" if lines else "\nNothing is slower than before.")
    print("\n".join(lines))
    return 1 if lines else 0


def _parser() -> Parser:
    parser = Parser(
        "adaclip bench",
        "Measure how fast this package is on this machine, beside plain implementations and bounds in the same run. "
        "Weights and data are random, and nothing is downloaded. Results are compared with those of the plain "
        "implementation before anything is timed.",
        "adaclip bench [ROW ...] [--device NAME] [--precision NAME] [--turns N] [--quick] "
        "[--processor_time] [--json FILE] [--compare FILE]",
        "The table shows medians over turns, in which the alternatives alternate. See docs/benchmarks.md.",
    )
    add, rows = parser.add_argument, "; ".join(f"{name}, {row.help}" for name, row in ROWS.items())
    add("rows", metavar="ROW", nargs="*", help=f"by default all: {rows}")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "xpu"), help="device to compute on [default: auto]")
    add("--precision", choices=("fp32", "bf16"), help="precision of the model [default: bf16 on CUDA, otherwise fp32]")
    add("--turns", type=int, default=2, metavar="N", help="timed turns [default: 2]")
    add("--quick", action="store_true", help="only check that everything works, at the smallest sizes")
    clock = "measure processor time, which other work on a CPU disturbs less; set OMP_NUM_THREADS=1, too"
    add("--processor_time", action="store_true", help=clock)
    add("--json", metavar="FILE", type=a_path, help="also write the results to this file")
    compare = "results of an earlier --json on this machine; the exit code is 1 if something is slower now"
    add("--compare", metavar="FILE", type=a_path, help=compare)
    return parser
