// One video in a dialog: it plays from its best moment, and the frames below lead to theirs.

import { clock, element } from "/cards.js";

const get = (id) => document.getElementById(id);
const dialog = get("player"), stage = get("stage"), trouble = get("player-trouble");

export function play(video) {
  get("player-title").textContent = video.id;
  get("player-captions").textContent = video.captions.join("\n");
  get("player-path").textContent = video.path;
  get("copy").textContent = "Copy";
  get("download").hidden = !video.video;
  get("download").href = video.video || "";
  get("download").download = video.id.split("/").pop();
  say("");
  const best = video.frames[video.best];
  const screen = video.video ? moving(video, best?.time ?? 0) : still(video);
  if (!video.video) say("This index was made of frames: there is no video file to play.");
  stage.replaceChildren(screen);
  get("frames").replaceChildren(...video.frames.map((frame, place) => shown(frame, place === video.best, video.duration)));
  dialog.showModal();
  dialog.scrollTop = 0;
  screen.focus?.();
}

dialog.addEventListener("close", () => {
  stage.querySelector("video")?.pause();
  stage.replaceChildren();
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
get("player-close").addEventListener("click", () => dialog.close());
get("copy").addEventListener("click", copy);
get("frames").addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const all = [...event.currentTarget.querySelectorAll("button")];
  all[all.indexOf(document.activeElement) + step]?.focus();
  event.preventDefault();
});

function moving(video, from) {
  const screen = element("video");
  screen.controls = true;
  screen.playsInline = true;
  screen.preload = "auto";
  if (video.poster) screen.poster = video.poster;
  screen.setAttribute("aria-label", video.id);
  screen.addEventListener("loadedmetadata", () => {
    if (!screen.videoWidth) return unplayable(screen, video);  // sound alone
    screen.currentTime = from;
    screen.play().catch(() => {});  // then it waits for its own button
  });
  screen.addEventListener("error", () => unplayable(screen, video));
  screen.src = video.video;
  return screen;
}

function still(video) {
  const picture = element("img");
  picture.alt = `The best frame of ${video.id}`;
  if (video.poster) picture.src = video.poster;
  else picture.hidden = true;
  return picture;
}

// Why it does not play: the server knows if the file has gone, else it is the browser that cannot.
async function unplayable(screen, video) {
  if (!screen.isConnected) return;
  if (document.activeElement === screen) get("player-close").focus();
  stage.replaceChildren(still(video));
  for (const button of get("frames").querySelectorAll("button")) button.disabled = true;
  let reason = "This browser cannot play this kind of file. Open it in a video player: its place is below, or download it.";
  try {
    const answer = await fetch(video.video, { headers: { Range: "bytes=0-0" } });
    if (!answer.ok) reason = (await answer.json()).detail;
  } catch {
    reason = "The server does not answer. Is it still running in its terminal?";
  }
  say(reason);
}

function shown(frame, best, duration) {
  const button = element("button", best ? "best" : ""), picture = element("img"), line = element("span", "line"), bar = element("span", "weight");
  const weight = `${Math.round(100 * frame.weight)} %`, time = frame.time === null ? `frame ${frame.index + 1}` : clock(frame.time, duration);
  button.type = "button";
  button.setAttribute("aria-label", `${best ? "Best frame" : "Frame"} at ${time}, weight ${weight}`);
  picture.alt = "";
  picture.src = frame.picture;
  bar.style.width = `${100 * frame.weight}%`;
  line.append(element("span", "", time), element("span", "", weight));
  button.append(picture, bar, line);
  button.disabled = frame.time === null || !stage.querySelector("video");
  button.addEventListener("click", () => {
    const screen = stage.querySelector("video");
    if (!screen) return;
    screen.currentTime = frame.time;
    screen.play().catch(() => {});
  });
  const item = element("li");
  item.append(button);
  return item;
}

async function copy() {
  try {
    await navigator.clipboard.writeText(get("player-path").textContent);
    get("copy").textContent = "Copied";
  } catch {  // not allowed where the page came over plain http from another machine
    getSelection().selectAllChildren(get("player-path"));
    get("copy").textContent = "Selected";
  }
}

function say(text) {
  trouble.textContent = text;
  trouble.hidden = !text;
}
