"""A folder of videos, embedded once and searched by text or picture: `index.py` to load, `retriever.py` to ask."""
