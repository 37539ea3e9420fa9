"""Towers, one in each file, chosen by the setting `tower`: how CLIP's image tower encodes the frames of a video."""
