"""`adaclip schema`: print the JSON Schema of the settings."""

from __future__ import annotations

import json
from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config import Config


def run(words: Sequence[str]) -> int:
    """Print the JSON Schema of the settings (cfgs/schema.json). Returns the exit code."""

    Parser("adaclip schema", f"{run.__doc__}").read(words)
    document = Config.model_json_schema()
    document["properties"] = {
        "$schema": {"type": "string", "description": "the schema of this file, for editors"}
    } | document["properties"]
    document["title"] = "Settings of adaclip-finetune"
    print(json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema"} | document, indent=2))
    return 0
