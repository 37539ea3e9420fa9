"""What happens to a video's frames inside CLIP's image tower: a file a tower, chosen by the setting `tower`."""
