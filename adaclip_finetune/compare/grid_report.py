"""The report of a grid."""

from adaclip_finetune.compare.grid import Grid


def write_report(grid: Grid) -> str:
    return "report"
