"""The page and JSON API of `adaclip serve`."""
