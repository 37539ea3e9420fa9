"""The error analysis as one HTML file that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from html import escape

from adaclip_finetune.compare.bars import draw_bars
from adaclip_finetune.compare.error_report import ErrorReport, Miss, ShownVideo
from adaclip_finetune.compare.strips import ShownFrame
from adaclip_finetune.evaluation.bootstrap import intervals
from adaclip_finetune.evaluation.metrics import DirectionMetrics, IntArray

_COUNTED = "ties count against; 95 %: interval of R@1, drawn over videos"
_CAPTIONS = 3  # of a video, at most
_FRAMES = (
    "Below each frame that the model looked at: its number, from 0; when it is shown; and, where there is a selector, "
    "its share of the softmax over all candidates."
)
_RECKONED = " ≈: reckoned from the annotated length or the frame rate, as if frames were evenly spaced."
_SCORES = " Scores are the scaled cosine of text and video."
_NO_FRAMES = "From a saved matrix, without videos, so there are no frames to show. Scores are the matrix's."

_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f6f7f9; --ink: #1b1f24; --quiet: #5b6570;
  --line: #d9dde2; --bar: #2f6fb3; --right: #1a7f4b; --wrong: #b3402f; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171a; --card: #1e2327; --ink: #e6e9ec; --quiet: #9aa5b0;
  --line: #363d44; --bar: #6aa6e6; --right: #5cc48c; --wrong: #f08f7d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: .25rem 0; }
.quiet { color: var(--quiet); fill: var(--quiet); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
figure { margin: 0; padding: 1rem; background: var(--card); border-radius: .5rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
svg { display: block; width: 100%; max-width: 30rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .quiet { fill: var(--quiet); }
.track { fill: var(--line); opacity: .6; }
.bar { fill: var(--bar); }
article { margin: 1rem 0; padding: 1rem; background: var(--card); border-radius: .5rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
section { border-left: .25rem solid var(--line); padding-left: .75rem; min-width: 0; }
section.right { border-color: var(--right); }
section.wrong { border-color: var(--wrong); }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(6rem, 1fr)); gap: .5rem; padding: .5rem 0;
  margin: 0; list-style: none; }
.strip li { font-size: .8rem; color: var(--quiet); }
.strip img { display: block; width: 100%; height: auto; border-radius: .25rem; }
table { border-collapse: collapse; }
th, td { text-align: right; white-space: nowrap; padding: .15rem .75rem .15rem 0; font-variant-numeric: tabular-nums; }
th:first-child { text-align: left; }
.scroll { overflow-x: auto; }
"""


def error_page(report: ErrorReport) -> str:
    """The whole file. Everything that comes from captions and names is escaped."""
    title = f"What {report.label} gets wrong on {report.annotation}"
    videos = len(report.queries.video_ids)
    missing = report.num_listed - videos
    left_out = f", <strong>{missing:,} of {report.num_listed:,} videos MISSING</strong>" if missing else ""
    queries = len(report.metrics.t2v.ranks)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="quiet">{queries:,} captions, {videos:,} videos{left_out}; {_COUNTED}</p>
{_figures(report)}
<h2>Where recall is lost</h2>
<div class="charts">
{_charts(report)}
</div>
<h2>{_heading(report)}</h2>
<p class="quiet">{_explained(report)}</p>
{"".join(map(_miss, report.misses))}
</main>
</body>
</html>
"""


def _figures(report: ErrorReport) -> str:
    videos = report.queries.video_of_text
    rows = [("text → video", report.metrics.t2v, videos), ("video → text", report.metrics.v2t, None)]
    names = ("R@1", "95 %", "R@5", "R@10", "MedR", "MeanR")
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    lines = "".join(f'<tr><th scope="row">{name}</th>{_cells(found, of)}</tr>' for name, found, of in rows)
    return f'<div class="scroll"><table><tr><td></td>{head}</tr>{lines}</table></div>'


def _cells(direction: DirectionMetrics, videos: IntArray | None) -> str:
    low, high = intervals(direction.ranks, videos)["R@1"]
    recalls = [f"{direction.recall(k):.1f}" for k in (1, 5, 10)]
    cells = [recalls[0], f"[{low:.1f}, {high:.1f}]", *recalls[1:]]
    cells += [f"{direction.median_rank:.1f}", f"{direction.mean_rank:.1f}"]
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _charts(report: ErrorReport) -> str:
    charts = [
        ("Ranks of the right video", report.ranks, ""),
        ("R@1 by length of the caption", report.words, "of "),
        ("R@1 by length of the video", report.lengths, "of "),
    ]
    figures = []
    for caption, bars, of_count in charts:
        said = "; ".join(f"{bar.label}: {bar.share:.1f} % ({bar.count})" for bar in bars)
        chart = draw_bars(bars, f"{caption}. {said}", of_count) if bars else "<p>The length is not known.</p>"
        figures.append(f"<figure><figcaption>{caption}</figcaption>{chart}</figure>")
    return "\n".join(figures)


def _heading(report: ErrorReport) -> str:
    wrong = int((report.metrics.t2v.ranks > 1).sum())
    if not wrong:
        return "No query is answered wrongly"
    return f"The worst {len(report.misses)} of {wrong:,} queries whose right video is not first"


def _explained(report: ErrorReport) -> str:
    if not report.has_frames:
        return _NO_FRAMES
    strips = [video.strip for miss in report.misses for video in (miss.expected, miss.found)]
    reckoned = any(frame.seconds is not None and not frame.measured for strip in strips for frame in strip.frames)
    return _FRAMES + (_RECKONED if reckoned else "") + _SCORES


def _miss(miss: Miss) -> str:
    return f"""<article>
<h3><bdi>“{escape(miss.query)}”</bdi></h3>
<div class="pair">
{_video(miss.expected, "right", f"Should have been found: rank {miss.rank:,}")}
{_video(miss.found, "wrong", "Found first instead")}
</div>
</article>
"""


def _video(video: ShownVideo, kind: str, what: str) -> str:
    said = "; ".join(f"“{escape(text)}”" for text in video.captions[:_CAPTIONS])
    more = f" and {len(video.captions) - _CAPTIONS} more" if len(video.captions) > _CAPTIONS else ""
    frames = "".join(_frame(frame, video.video_id) for frame in video.strip.frames)
    problem = f'<p class="quiet">{escape(video.strip.problem)}</p>' if video.strip.problem else ""
    strip = f'<ol class="strip">{frames}</ol>' if frames else problem
    return (
        f'<section class="{kind}"><p><strong>{what}</strong>, score {video.score:.2f}: '
        f'<bdi>{escape(video.video_id)}</bdi></p>{strip}<p class="quiet"><bdi>{said}{more}</bdi></p></section>'
    )


def _frame(frame: ShownFrame, video_id: str) -> str:
    when = "" if frame.seconds is None else f", {'' if frame.measured else '≈ '}{frame.seconds:.1f} s"
    share = "" if frame.share is None else f"<br>{frame.share:.0f} %"
    alt = escape(f"frame {frame.index} of {video_id}", quote=True)
    return f'<li><img src="{frame.picture}" alt="{alt}">{frame.index}{when}{share}</li>'
