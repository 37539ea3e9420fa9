"""Annotation files of published data sets: `published` reads them into clips, `write` writes clips as annotations."""
