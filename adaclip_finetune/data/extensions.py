"""How the names of video files end. Files with other names are videos, too, if the reader can open them."""

VIDEO_EXTENSIONS = (
    "mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "3gp", "ts", "flv", "wmv",
    "3g2", "asf", "divx", "dv", "f4v", "gif", "m1v", "m2t", "m2ts", "m2v", "mjpeg", "mjpg", "mpe", "mts", "mxf",
    "ogm", "ogv", "rm", "rmvb", "vob", "y4m",
)  # fmt: skip
