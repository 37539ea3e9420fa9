// What is asked, what came back, and what the server is doing.

import { card } from "/cards.js";
import { play } from "/player.js";

const get = (id) => document.getElementById(id);
const query = get("query"), results = get("results");
const MAX_PICTURE = 20 * 2 ** 20, PICTURES = ["image/jpeg", "image/png", "image/webp"];
const GONE = "The server does not answer. Is it still running in its terminal? This page tries again by itself.";

let picture = null;  // a File, asked for in place of the words
let page = 1, pages = 1;
let ready = false;
let failed = "";  // why nothing can be searched
let version = "";  // of the index that is shown
let waiting = false;  // something is asked, and the model is not there yet
let running = null;  // AbortController of the search under way
let current = null;  // what is being asked, or is shown
let typing = 0, watching = 0;  // timers

start();

function start() {
  get("form").addEventListener("submit", (event) => { event.preventDefault(); ask(1, "push"); });
  query.addEventListener("input", (event) => {
    clearTimeout(typing);
    if (!event.isComposing) typing = setTimeout(() => ask(1, "replace"), 350);
  });
  get("choose").addEventListener("click", () => get("file").click());
  get("file").addEventListener("change", () => { byPicture(get("file").files[0]); get("file").value = ""; });
  get("picture-away").addEventListener("click", () => { dropPicture(); query.focus(); ask(1, "push"); });
  get("previous").addEventListener("click", () => turn(-1));
  get("next").addEventListener("click", () => turn(1));
  addEventListener("popstate", fromAddress);
  document.addEventListener("keydown", keys);
  dropping();
  fromAddress();
  watch();
}

// The address holds the words and the page, so that back, reload and bookmarks work.
function fromAddress() {
  const asked = new URLSearchParams(location.search);
  dropPicture();
  query.value = asked.get("q") ?? "";
  ask(Math.min(Math.max(parseInt(asked.get("page"), 10) || 1, 1), 50), "keep");
}

async function ask(number, address) {
  clearTimeout(typing);
  const words = query.value.trim();
  if (words && picture && address !== "turn") dropPicture();
  const wanted = JSON.stringify([words, Boolean(picture), number]);
  if (wanted === current && (running || address !== "push")) return;  // Enter asks again, but not twice at once
  running?.abort();
  page = number;
  remember(words, address);
  if (!words && !picture) {
    waiting = false;
    current = null;
    show(null);
    if (failed) return fail(failed);
    return say(ready ? "" : "Loading the model…", !ready);
  }
  waiting = !ready;
  if (failed) return fail(failed);
  if (!ready) return say("Loading the model; your search starts when it is there…", true);
  const mine = running = new AbortController();
  current = wanted;
  say("Searching…", true);
  results.setAttribute("aria-busy", "true");
  try {
    const answer = await asked(words, mine.signal);
    const content = await answer.json();
    if (mine.signal.aborted) return;
    const anew = answer.ok && address === "turn" && version !== "" && content.version !== version;
    if (answer.ok) version = content.version;
    if (anew && number > 1) return await again();
    show(answer.ok ? content : null, anew);
    if (answer.ok) return;
    current = null;
    fail(content.detail);
  } catch (error) {
    if (error.name === "AbortError") return;
    current = null;
    fail(GONE);
    ready = false;
    waiting = true;
    watchSoon(2000);
  } finally {
    if (running === mine) {
      running = null;
      results.removeAttribute("aria-busy");
    }
  }
}

// Pages of two versions of an index do not belong together.
function again() {
  current = version = null;
  return ask(1, "turn");
}

function asked(words, signal) {
  if (picture) return fetch(`/api/search/image?page=${page}`, { method: "POST", body: picture, signal });
  return fetch(`/api/search?${new URLSearchParams({ q: words, page })}`, { signal });
}

function remember(words, address) {
  if (address === "keep") return;
  const wanted = new URLSearchParams(words && !picture ? { q: words } : {});
  if (page > 1 && words && !picture) wanted.set("page", page);
  const url = wanted.size ? `/?${wanted}` : "/";
  if (url === location.pathname + location.search) return;
  if (address === "replace") history.replaceState(null, "", url);
  else history.pushState(null, "", url);
}

function show(content, anew = false) {
  trouble("");
  results.replaceChildren(...(content ? content.found.map((video) => card(video, play)) : []));
  get("pages").hidden = !content || content.pages < 2;
  if (!content) return;
  pages = content.pages;
  get("page").textContent = content.page > pages ? `There are ${pages} pages` : `Page ${content.page} of ${pages}`;
  get("previous").disabled = content.page <= 1;
  get("next").disabled = content.page >= content.pages;
  const found = content.found, first = anew ? "The index was made anew meanwhile: from the beginning. " : "";
  count(content.videos);
  if (!content.videos) say("This index is empty: `adaclip index` puts videos into it.");
  else if (!found.length) say("No videos on this page: these were all.");
  else say(`${first}Videos ${found[0].rank} to ${found.at(-1).rank} of ${content.videos.toLocaleString("en")}, the best first`);
}

async function turn(step) {
  await ask(Math.min(page + step, pages), "turn");
  scrollTo({ top: 0 });
  results.querySelector(".card")?.focus({ preventScroll: true });
}

// How far the model is, asked until it is there.
async function watch() {
  let status;
  try {
    const answer = await fetch("/api/status");
    status = await answer.json();
    if (!answer.ok) {
      if (answer.status !== 401) watchSoon(2000);
      return fail(status.detail);
    }
  } catch {
    fail(GONE);
    return watchSoon(2000);
  }
  get("name").textContent = status.index;
  document.title = `${status.index} · video search`;
  count(status.videos);
  if (status.state === "failed") {
    failed = `Nothing can be searched: ${status.message}\nThis page goes on by itself when \`adaclip serve\` was started anew.`;
    ready = false;
    waiting = Boolean(query.value.trim() || picture);
    fail(failed);
    return watchSoon(3000);
  }
  failed = "";
  trouble("");
  if (status.state === "loading") {
    say(waiting ? "Loading the model; your search starts when it is there…" : "Loading the model…", true);
    return watchSoon(500);
  }
  ready = true;
  if (!status.videos) return say("This index is empty: `adaclip index` puts videos into it.");
  if (waiting) ask(page, picture ? "turn" : "keep");
  else if (!results.children.length) say("Ready");
}

function count(videos) {
  get("count").textContent = `${videos.toLocaleString("en")} video${videos === 1 ? "" : "s"}`;
}

function watchSoon(milliseconds) {
  clearTimeout(watching);
  watching = setTimeout(watch, milliseconds);
}

function byPicture(file) {
  if (!file) return;
  if (!PICTURES.includes(file.type)) return fail(`${file.name || "That"} is no picture that can be searched by: JPEG, PNG or WebP, please.`);
  if (file.size > MAX_PICTURE) return fail(`${file.name} has more than 20 MB; a smaller copy will do.`);
  query.value = "";
  dropPicture();
  picture = file;
  current = null;
  get("picture-seen").src = URL.createObjectURL(file);
  get("picture-seen").alt = `Searching by the picture ${file.name}`;
  get("picture").hidden = false;
  ask(1, "push");
}

function dropPicture() {
  if (!picture) return;
  URL.revokeObjectURL(get("picture-seen").src);
  get("picture").hidden = true;
  picture = null;
}

function dropping() {
  let depth = 0;  // enter and leave come for every element on the way
  const over = (by) => { depth = Math.max(0, depth + by); get("drop").hidden = !depth; };
  addEventListener("dragenter", (event) => { if (event.dataTransfer?.types.includes("Files")) over(1); });
  addEventListener("dragleave", (event) => { if (event.dataTransfer?.types.includes("Files")) over(-1); });
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    over(-depth);
    if (get("player").open) get("player").close();
    byPicture(event.dataTransfer.files[0]);
  });
}

function keys(event) {
  if (get("player").open || event.altKey || event.ctrlKey || event.metaKey) return;
  if (event.key === "/" && event.target !== query) {
    event.preventDefault();
    query.focus();
    return query.select();
  }
  const cards = [...results.querySelectorAll(".card")], at = cards.indexOf(document.activeElement);
  if (event.key === "Escape" && at >= 0) return query.focus();
  if (event.key === "ArrowDown" && event.target === query && cards.length) {
    event.preventDefault();
    return cards[0].focus();
  }
  if (at < 0) return;
  const across = cards.filter((one) => one.getBoundingClientRect().top === cards[0].getBoundingClientRect().top).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  if (!step) return;
  event.preventDefault();
  if (at + step < 0 && event.key === "ArrowUp") query.focus();
  else cards[at + step]?.focus();
}

function say(text, working = false) {
  get("status").textContent = text;
  get("status").classList.toggle("working", working);
}

function fail(text) {
  say("");
  trouble(text);
}

// The same again is not said again: a screen reader would read it out every time.
function trouble(text) {
  if (get("trouble").textContent !== text) get("trouble").textContent = text;
}
