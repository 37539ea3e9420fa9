// A video that was found: its card, and the dialog that plays it.

const get = (id) => document.getElementById(id);
const dialog = get("player"), stage = get("stage");
let watching = 0;  // the animation frame in which the end of a moment is looked for

export function card(video, onClick) {
  const moment = video.moments[0], button = element("button", "card");
  const best = moment ?? video.frames[video.best], at = when(video.line ?? best, video);
  const seen = element("span", "seen"), words = element("span", "words");
  const title = element("span", "line"), caption = video.captions[0] ?? "";
  seen.append(image(best?.poster ?? video.poster));
  if (at) seen.append(element("span", "at", at));
  const places = video.copies.length ? ` (${1 + video.copies.length} places)` : "";
  title.append(element("span", "name", video.id + places), element("span", "score", video.score.toFixed(3)));
  words.append(title, element("span", "caption", caption));
  if (video.line) words.append(element("span", "said", `“${video.line.text}”`));
  button.append(seen, timeline(video), words);
  button.type = "button";
  const part = video.line ? `“${video.line.text}” said` : "best moment";
  const said = at && `, ${part} ${at.includes("–") ? "from" : "at"} ${at.replace("–", " to ")}`;
  button.setAttribute("aria-label", `${video.rank}. ${caption || video.id}, score ${video.score.toFixed(3)}${said}. Play`);
  button.addEventListener("click", () => onClick(video));
  return inList(button);
}

// The time of a frame, or from when to when a moment lasts; "" if it is not known.
function when(part, video) {
  if (part?.end !== undefined) return `${clock(part.start, video.duration)}–${clock(part.end, video.duration)}`;
  return part && part.time !== null ? clock(part.time, video.duration) : "";
}

// Marks where the moments are, or else the frames, as high as their scores or weights.
function timeline(video) {
  const line = element("span", "timeline");
  line.append(...(video.moments.length ? momentMarks(video) : frameMarks(video)));
  return line;
}

function frameMarks(video) {
  const most = Math.max(...video.frames.map((frame) => frame.weight));
  return video.frames.map((frame, place) => {
    const mark = element("i", place === video.best ? "best" : "");
    if (frame.time === null || !video.duration) return "";
    mark.style.left = `${1.5 + 97 * Math.min(frame.time / video.duration, 1)}%`;
    mark.style.height = `${Math.max(15, 100 * frame.weight / most)}%`;
    return mark;
  });
}

function momentMarks(video) {
  if (!video.duration) return [];
  const most = video.moments[0].score, share = (time) => 97 * Math.min(time / video.duration, 1);
  return video.moments.map((moment, place) => {
    const mark = element("i", place ? "span" : "span best");
    mark.style.left = `${1.5 + share(moment.start)}%`;
    mark.style.width = `${share(moment.end) - share(moment.start)}%`;
    mark.style.height = `${Math.max(15, most > 0 ? 100 * moment.score / most : 100)}%`;
    return mark;
  });
}

// Play a video from the line that was found in it, or from its best moment, to the end of it if that is known; moments and frames below lead to theirs.
export function play(video) {
  get("player-title").textContent = video.id;
  get("line").hidden = !video.line;
  get("line").textContent = video.line ? `${clock(video.line.start, video.duration)} “${video.line.text}”` : "";
  get("line").disabled = !video.video;
  get("line").onclick = () => seek(video.line.start);
  get("player-captions").textContent = video.captions.join("\n");
  get("player-path").textContent = [video.path, ...video.copies].join("\n");
  get("download").hidden = !video.video;
  get("download").href = video.video ?? "";
  get("download").download = video.id.split("/").pop();
  say(video.video ? "" : "This index was made of frames: there is no video file to play.");
  stage.replaceChildren(video.video ? screen(video) : image(video.poster, `The best frame of ${video.id}`));
  const { moments } = video;
  get("bar").hidden = get("moments-title").hidden = !moments.length;
  get("bar").replaceChildren(...(moments.length ? momentMarks(video) : []));
  get("moments").replaceChildren(...moments.map((moment) => momentButton(moment, video)));
  choose(moments[0]);
  get("frames").replaceChildren(...video.frames.map((frame, place) => frameButton(frame, place === video.best, video)));
  dialog.showModal();
  dialog.scrollTop = 0;
  stage.querySelector("video")?.focus();
}

get("player-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => {
  stage.querySelector("video")?.pause();
  stage.replaceChildren();
});

function screen(video) {
  const made = element("video");
  Object.assign(made, { controls: true, playsInline: true, preload: "auto", poster: video.poster });
  made.setAttribute("aria-label", video.id);
  made.addEventListener("loadedmetadata", () => {
    if (made.videoWidth) begin(video);
    else showStill(video);  // only the sound can be played
  });
  made.addEventListener("error", () => showStill(video));
  made.src = video.video;
  return made;
}

function begin(video) {
  const [moment] = video.moments;
  if (video.line) seek(video.line.start);
  else if (moment) seek(moment.start, moment.end);
  else seek(video.frames[video.best]?.time ?? 0);
}

// Play from `time` on, and stop at `end`, unless somebody moves elsewhere or plays on.
function seek(time, end = Infinity) {
  const made = stage.querySelector("video");
  if (!made) return;
  made.currentTime = time;
  made.play().catch(() => {});  // the browser may wait for a click on its own button
  cancelAnimationFrame(watching);
  const watch = () => {
    const now = made.currentTime;
    if (!made.isConnected || now < time - 0.5 || now > end + 0.5) return;
    if (now >= end - 0.04) return made.pause();  // before the frame that follows is shown
    watching = requestAnimationFrame(watch);
  };
  if (end < Infinity) watching = requestAnimationFrame(watch);
}

// Make a moment the one that is saved.
function choose(moment) {
  get("cut").hidden = !moment?.clip;
  for (const [id, exact] of [["clip", ""], ["clip-exact", "&exact=true"]]) get(id).href = (moment?.clip ?? "") + exact;
  [...get("moments").querySelectorAll("button")].forEach((one) => one.classList.toggle("best", one.moment === moment));
}

function momentButton(moment, video) {
  const button = element("button"), line = element("span", "line"), score = moment.score.toFixed(3);
  button.type = "button";
  button.moment = moment;
  button.setAttribute("aria-label", `Moment from ${when(moment, video).replace("–", " to ")}, score ${score}. Play`);
  button.disabled = !video.video;
  button.addEventListener("click", () => { choose(moment); seek(moment.start, moment.end); });
  line.append(element("span", "", when(moment, video)), element("span", "", score));
  button.append(image(moment.poster), line);
  return inList(button);
}

// Say why a video does not play: the server knows whether its file is there and unchanged.
async function showStill(video) {
  if (!stage.querySelector("video")) return;
  stage.replaceChildren(image(video.poster, `The best frame of ${video.id}`));
  get("player-close").focus();
  for (const button of dialog.querySelectorAll("#line, #frames button, #moments button")) button.disabled = true;
  let reason = "This browser cannot play this kind of file. Open it in a video player: its path is below, or download it.";
  try {
    const answer = await fetch(video.video, { headers: { Range: "bytes=0-0" } });
    if (!answer.ok) reason = (await answer.json()).detail;
  } catch {
    reason = "The server does not answer. Is it still running in its terminal?";
  }
  say(reason);
}

function frameButton(frame, best, video) {
  const button = element("button", best ? "best" : ""), line = element("span", "line"), bar = element("span", "weight");
  const weight = `${Math.round(100 * frame.weight)} %`;
  const time = frame.time === null ? `frame ${frame.index + 1}` : clock(frame.time, video.duration);
  button.type = "button";
  button.setAttribute("aria-label", `${best ? "Best frame" : "Frame"} at ${time}, weight ${weight}`);
  button.disabled = frame.time === null || !video.video;
  button.addEventListener("click", () => seek(frame.time));
  bar.style.width = `${100 * frame.weight}%`;
  line.append(element("span", "", time), element("span", "", weight));
  button.append(image(frame.picture), bar, line);
  return inList(button);
}

function say(text) {
  get("player-trouble").textContent = text;
  get("player-trouble").hidden = !text;
}

// 75.4 → 1:15; in a video shorter than a minute, 15.4 → 0:15.4
function clock(seconds, duration) {
  if (duration < 60) return `0:${(Math.floor(10 * seconds) / 10).toFixed(1).padStart(4, "0")}`;
  const whole = Math.floor(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

function element(name, className = "", text = "") {
  return Object.assign(document.createElement(name), { className, textContent: text });
}

function image(src, alt = "") {
  const made = element("img");
  made.alt = alt;
  made.loading = "lazy";
  made.addEventListener("error", () => made.remove());
  made.src = src;
  return made;
}

function inList(button) {
  const item = element("li");
  item.append(button);
  return item;
}
