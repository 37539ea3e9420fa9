// A video that was found, as a card: poster, where its frames are, name, score.

export function card(video, play) {
  const button = element("button", "card");
  button.type = "button";
  const best = video.frames[video.best];
  const moment = best && best.time !== null ? `, best moment at ${clock(best.time, video.duration)}` : "";
  button.setAttribute("aria-label", `${video.rank}. ${video.captions[0] || video.id}, score ${video.score.toFixed(3)}${moment}. Play`);
  button.append(seen(video, best), timeline(video), words(video));
  button.addEventListener("click", () => play(video));
  const item = element("li");
  item.append(button);
  return item;
}

export function element(name, className = "", text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

// 75.4 → 1:15; in a video of less than a minute 15.4 → 0:15.4
export function clock(seconds, duration) {
  if (duration < 60) return `0:${(Math.floor(10 * seconds) / 10).toFixed(1).padStart(4, "0")}`;
  const whole = Math.floor(seconds), hours = Math.floor(whole / 3600);
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}` : `${Math.floor(whole / 60)}:${two(whole % 60)}`;
}

function seen(video, best) {
  const box = element("span", "seen");
  if (video.poster) {
    const image = element("img");
    image.alt = "";
    image.loading = "lazy";
    image.src = video.poster;
    image.addEventListener("error", () => image.remove());
    box.append(image);
  }
  if (best && best.time !== null) box.append(element("span", "at", clock(best.time, video.duration)));
  return box;
}

// A mark where each frame is, as high as its weight.
function timeline(video) {
  const line = element("span", "timeline");
  const most = Math.max(...video.frames.map((frame) => frame.weight), 0);
  video.frames.forEach((frame, place) => {
    if (frame.time === null || !video.duration) return;
    const mark = element("i", place === video.best ? "best" : "");
    mark.style.left = `${1.5 + 97 * Math.min(frame.time / video.duration, 1)}%`;
    mark.style.height = `${Math.max(15, 100 * frame.weight / most)}%`;
    line.append(mark);
  });
  return line;
}

function words(video) {
  const box = element("span", "words"), line = element("span", "line"), score = element("span", "score", video.score.toFixed(3));
  score.title = "cosine between the query and the video";
  line.append(element("span", "name", video.id), score);
  box.append(line);
  if (video.captions.length) box.append(element("span", "caption", video.captions[0]));
  return box;
}
