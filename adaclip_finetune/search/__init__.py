"""A folder of videos, embedded once and searched by text or picture: `index.py` to load, `search_model.py` to ask."""
