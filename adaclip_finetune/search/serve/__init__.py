"""`adaclip serve`: a page on this machine to search an index by text or picture; `command.py` starts it, `app.py` is
what it answers."""
