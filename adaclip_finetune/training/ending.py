"""How runs end that do not end by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from adaclip_finetune.processes import explain_lost_process
from adaclip_finetune.training.run_folder import RunFolder
from adaclip_finetune.training.signals import Interrupted


@contextmanager
def ending_well(run: RunFolder) -> Iterator[None]:
    """However a run ends: it is told how to go on, and the folder is let go."""
    try:
        yield
    except Interrupted:
        _say_how_to_go_on(run)
        raise
    except RuntimeError as error:
        if explained := explain_lost_process(error):
            _say_how_to_go_on(run)
            raise explained from error
        raise
    finally:
        run.close()


def _say_how_to_go_on(run: RunFolder) -> None:
    if folder := run.path or run.going_on:
        run.say(f"stopped. To go on: python train.py --resume {folder}")
    else:
        run.say("stopped; nothing is kept, and nothing can go on")
