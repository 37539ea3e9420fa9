"""`adaclip push`: share a run on the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser, a_path


def run(words: Sequence[str]) -> int:
    """Upload a finished run to the Hugging Face Hub, with a card of its figures."""
    parser = Parser(
        "adaclip push",
        f"{run.__doc__} Weights, settings and figures are uploaded; settings name your files and folders. "
        "Log in first: hf auth login.",
        "adaclip push RUN OWNER/NAME [--private] [--card]",
        "Then every command takes hf:OWNER/NAME in place of a run folder.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=a_path, help="the folder of a finished run")
    add("repository", metavar="OWNER/NAME", help="the repository, which is made if there is none")
    add("--private", action="store_true", help="make a new repository that only you can see")
    add("--card", action="store_true", help="print the card (README.md), and upload nothing")
    arguments = parser.read(words)

    from adaclip_finetune.hub import model_card, push

    if arguments.card:
        print(model_card(arguments.run, arguments.repository))
    else:
        print(push(arguments.run, arguments.repository, arguments.private))
    return 0
