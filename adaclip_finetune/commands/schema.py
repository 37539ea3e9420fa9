"""`adaclip schema`: print the JSON Schema of the settings."""

import json
from collections.abc import Sequence

from adaclip_finetune.commands.flags import Parser
from adaclip_finetune.config import Config


def run(words: Sequence[str]) -> int:
    """Print the JSON Schema of the settings (cfgs/schema.json)."""
    Parser("adaclip schema", f"{run.__doc__}").read(words)
    schema = Config.model_json_schema()
    schema["properties"]["$schema"] = {"type": "string", "description": "the schema of this file, for editors"}
    print(json.dumps(schema, indent=2))
    return 0
