"""`adaclip compare`: a grid of finetuning methods under one recipe, in one table."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser, a_path


def run(words: Sequence[str]) -> int:
    """Train what is left of the grid and write the report. Return 1 if a method has no result; raise UserError."""
    parser = Parser(
        "adaclip compare",
        "Train several finetuning methods under one recipe, with the same updates, several seeds and the same small "
        "search of one setting, and write one table with intervals and costs, and a picture.",
        epilog="The config file has recipe (settings, or the path of a config file), methods (name -> settings that "
        "differ), seeds, search (setting -> values), reference (a method), output_dir and keep_weights; "
        "cfgs/compare-demo.json is one. "
        "The same command goes on after an interruption, and several of them at the same time share the work. "
        "See docs/comparing.md.",
    )
    parser.add_argument("config", metavar="CONFIG", type=a_path, help="the JSON file that describes the grid")
    arguments = parser.read(words)

    from adaclip_finetune.compare.grid import Grid, run_grid
    from adaclip_finetune.compare.grid_report import write_report

    return 0 if run_grid(Grid(arguments.config), write_report) else 1
