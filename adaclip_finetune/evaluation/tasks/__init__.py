"""Tasks: what a model is measured by. One file for each, chosen by the setting `task`."""
