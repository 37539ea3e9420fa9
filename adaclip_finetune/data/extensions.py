"""What the name of a video file ends in, whoever reads it: training in place, or extraction."""

VIDEO_EXTENSIONS = ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "3gp", "ts", "flv", "wmv")
