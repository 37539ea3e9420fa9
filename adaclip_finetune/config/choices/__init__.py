"""The parts of a run that are chosen by name. A file for each kind has a settings class and a line for each choice."""
