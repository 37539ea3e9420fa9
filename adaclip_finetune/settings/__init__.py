"""From declared settings to flags, help, JSON Schema and error messages. Knows nothing of what the settings mean."""
