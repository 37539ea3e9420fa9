// The query, its results, and the messages of the server.

import { card, play } from "/videos.js";

const get = (id) => document.getElementById(id);
const query = get("query"), results = get("results"), player = get("player");

let picture = null;  // a File that is searched by instead of the words
let page = 1, pages = 1;
let running = new AbortController();  // of the requests under way
let typing = 0, retry = 0;  // timers

get("form").addEventListener("submit", (event) => { event.preventDefault(); search("push"); });
query.addEventListener("input", (event) => {
  setPicture(null);
  clearTimeout(typing);
  if (!event.isComposing) typing = setTimeout(() => search("replace"), 350);
});
get("by").addEventListener("change", () => search("push"));
get("hybrid").addEventListener("change", () => search("push"));
get("where").addEventListener("change", () => search("push"));
get("choose").addEventListener("click", () => get("file").click());
get("file").addEventListener("change", () => { searchByPicture(get("file").files[0]); get("file").value = ""; });
get("picture-away").addEventListener("click", () => { setPicture(null); query.focus(); search("push"); });
get("previous").addEventListener("click", () => turn(-1));
get("next").addEventListener("click", () => turn(1));
addEventListener("popstate", readAddress);
document.addEventListener("keydown", useKey);
acceptDrops();
readAddress();

// The address holds the words, where and what to find, the filter, and the page, so that Back, Reload and bookmarks work.
function readAddress() {
  const given = new URLSearchParams(location.search);
  setPicture(null);
  query.value = given.get("q") ?? "";
  get("by").value = given.get("by") === "moment" ? "moment" : "video";
  get("hybrid").checked = given.has("hybrid");
  get("where").value = given.get("where") ?? "";
  if (get("where").value) get("filter").open = true;
  page = Math.max(parseInt(given.get("page"), 10) || 1, 1);
  update();
}

function writeAddress(how) {
  const words = picture ? "" : query.value.trim(), wanted = new URLSearchParams(words ? { q: words } : {});
  if (words && get("by").value === "moment") wanted.set("by", "moment");
  if (words && get("hybrid").checked) wanted.set("hybrid", 1);
  if (words && filter()) wanted.set("where", filter());
  if (words && page > 1) wanted.set("page", page);
  const url = wanted.size ? `/?${wanted}` : "/";
  if (url !== location.pathname + location.search) history[`${how}State`](null, "", url);
}

function filter() {
  return get("where").value.trim();
}

function search(how) {
  page = 1;
  writeAddress(how);
  update();
}

async function turn(step) {
  page = Math.min(page + step, pages);
  writeAddress("push");
  await update();
  scrollTo({ top: 0 });
  results.querySelector(".card")?.focus({ preventScroll: true });
}

// Show what the server says to the query as it is now, and ask again by itself where that may help.
async function update() {
  clearTimeout(typing);
  clearTimeout(retry);
  running.abort();
  const { signal } = running = new AbortController(), words = query.value.trim();
  try {
    const status = await fetched("/api/status", { signal });
    get("name").textContent = status.index;
    document.title = `${status.index} · video search`;
    get("by").hidden = !status.moments;
    if (!status.moments) get("by").value = "video";
    get("said").hidden = !status.lines || get("by").value === "moment";
    const count = `${status.videos.toLocaleString("en")} video${status.videos === 1 ? "" : "s"}`;
    get("count").textContent = `${count} · ${status.model}${status.finetuned ? "" : ", not finetuned"}`;
    if (status.state === "failed") throw new Error(`Nothing can be searched: ${status.message}`);
    if (status.state === "loading") {
      say(words || picture ? "Loading the model; your search starts when it is ready…" : "Loading the model…", true);
      retry = setTimeout(update, 500);
    } else if (!status.videos || !(words || picture)) {
      show(null);
      say(status.videos ? "Ready" : "This index is empty: `adaclip index` adds videos to it.");
    } else {
      say("Searching…", true);
      results.setAttribute("aria-busy", "true");
      const asked = new URLSearchParams({ page, by: get("by").value });
      if (filter()) asked.set("where", filter());
      if (!picture) asked.set("q", words);
      if (!picture && get("hybrid").checked && !get("said").hidden) asked.set("hybrid", true);
      show(picture ? await fetched(`/api/search/image?${asked}`, { method: "POST", body: picture, signal })
        : await fetched(`/api/search?${asked}`, { signal }));
    }
  } catch (error) {
    if (signal.aborted) return;
    show(null);
    const filtered = error.status === 422 && error.message.startsWith("where");
    say("", false, filtered ? "" : error.message);
    setFilterTrouble(filtered ? error.message.replace(/^where /, "") : "");
    if (!(error.status < 500)) retry = setTimeout(update, 2000);
  }
  if (!signal.aborted) results.removeAttribute("aria-busy");
}

async function fetched(url, options) {
  let answer;
  try {
    answer = await fetch(url, options);
  } catch (error) {
    throw options.signal.aborted ? error : new Error("The server does not answer. Is it still running in its terminal?");
  }
  const content = await answer.json().catch(() => ({ detail: answer.statusText }));
  if (answer.ok) return content;
  throw Object.assign(new Error(content.detail), { status: answer.status });
}

function show(answer) {
  setFilterTrouble("");
  get("nothing").textContent = answer?.nothing ?? "";
  get("nothing").hidden = !answer?.nothing;
  const byMoment = get("by").value === "moment";
  results.replaceChildren(...(answer?.found ?? []).map((video) => card(video, play)));
  get("pages").hidden = !answer || answer.pages < 2;
  if (!answer) return;
  pages = answer.pages;
  const of = byMoment ? "" : ` of ${pages}`;  // how many moments there are is not known in advance
  get("page").textContent = page > pages ? `There are ${pages} pages` : `Page ${page}${of}`;
  get("previous").disabled = page <= 1;
  get("next").disabled = page >= pages;
  const found = answer.found, all = answer.videos.toLocaleString("en"), what = byMoment ? "Moments" : "Videos";
  const last = found.length && `${found.at(-1).rank}${byMoment ? "" : ` of ${all}`}`;
  const none = !answer.videos && filter() ? "The filter holds for no video." : `No ${what.toLowerCase()} on this page.`;
  say(found.length ? `${what} ${found[0].rank} to ${last}, best first` : none);
}

function setFilterTrouble(text) {
  get("where-trouble").textContent = text;
  get("where").setAttribute("aria-invalid", Boolean(text));
  if (text) get("filter").open = true;
}

function say(text, working = false, trouble = "") {
  get("status").textContent = text;
  get("status").classList.toggle("working", working);
  if (get("trouble").textContent !== trouble) get("trouble").textContent = trouble;  // or a screen reader would repeat it
}

function searchByPicture(file) {
  if (!file) return;
  if (file.size > 20 * 2 ** 20) return say("", false, `${file.name} has more than 20 MB; use a smaller copy.`);
  query.value = "";
  setPicture(file);
  search("push");
}

function setPicture(file) {
  if (picture) URL.revokeObjectURL(get("picture-seen").src);
  picture = file;
  get("picture").hidden = !file;
  if (!file) return;
  get("picture-seen").src = URL.createObjectURL(file);
  get("picture-seen").alt = `Searching by the picture ${file.name}`;
}

function acceptDrops() {
  addEventListener("dragover", (event) => {
    event.preventDefault();
    get("drop").hidden = !event.dataTransfer.types.includes("Files");
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) get("drop").hidden = true; });
  addEventListener("drop", (event) => {
    event.preventDefault();
    get("drop").hidden = true;
    player.close();
    searchByPicture(event.dataTransfer.files[0]);
  });
}

function useKey(event) {
  if (player.open || event.altKey || event.ctrlKey || event.metaKey) return;
  const cards = [...results.querySelectorAll(".card")], at = cards.indexOf(document.activeElement);
  const across = cards.filter((one) => one.offsetTop === cards[0].offsetTop).length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
  let target;
  if (event.key === "/" && event.target.tagName !== "INPUT") target = query;
  else if (event.key === "Escape" && at >= 0) target = query;
  else if (event.key === "ArrowDown" && event.target === query) target = cards[0];
  else if (step && at >= 0) target = event.key === "ArrowUp" && at + step < 0 ? query : cards[at + step];
  if (!target) return;
  event.preventDefault();
  target.focus();
  if (event.key === "/") query.select();
}
