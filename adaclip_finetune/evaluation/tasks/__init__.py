"""What a model is measured by: a file a task, chosen by the setting `task`."""
