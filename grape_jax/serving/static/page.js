"use strict";
// Plain JavaScript: the page needs no build step and loads nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const TOP = 12;
const REASONS = {
  malformed: "The rewrite was malformed: the query itself was searched.",
  slow: "The rewrite took too long: the query itself was searched.",
  too_long: "The query is too long to rewrite: it was searched as it is.",
  failed: "The rewrite failed: the query itself was searched.",
};
const chosen = { id: null, file: null };  // the query's picture
let about = null;
let latest = 0;  // the number of the newest search; answers to older ones are dropped

async function read(response) {
  if (response.ok) return response.json();
  const error = await response.json().catch(() => ({}));
  throw new Error(error.detail || `The server answered ${response.status}.`);
}

function search(fields) {
  const form = new FormData();
  for (const [name, value] of Object.entries({ shift: $("shift").value, top: TOP, ...fields }))
    form.append(name, value);
  if (chosen.id !== null) form.append("picture", chosen.id);
  if (chosen.file) form.append("image", chosen.file);
  return fetch("search", { method: "POST", body: form }).then(read);
}

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

function picture(item) {
  const image = document.createElement("img");
  Object.assign(image, { src: item.picture, alt: item.name, loading: "lazy" });
  return image;
}

function show(side, answer, before) {
  const items = answer.matches.map((match) => {
    const item = document.createElement("li");
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    const rank = document.createElement("span");
    rank.className = "rank";
    rank.textContent = `${match.rank}. `;
    caption.append(rank, match.name);
    const was = before && before.indexOf(match.id) + 1;
    if (before && was !== match.rank) {
      const moved = document.createElement("span");
      moved.className = "was";
      moved.textContent = was ? ` (was ${was})` : " (new)";
      caption.append(moved);
    }
    figure.append(match.text === null ? picture(match) : document.createElement("p"), caption);
    if (match.text !== null) figure.firstChild.textContent = match.text;
    item.append(figure);
    return item;
  });
  $(`${side}-matches`).replaceChildren(...items);
  const time = `${answer.seconds < 0.1 ? (1000 * answer.seconds).toFixed(0) + " ms"
    : answer.seconds.toFixed(2) + " s"}${answer.cached ? ", from the cache" : ""}`;
  $(`${side}-note`).textContent = [REASONS[answer.fallback], time].filter(Boolean).join(" ");
}

// Runs a search that only the newest may show, and reports an error in its place.
async function newest(task) {
  const number = ++latest;
  say("");
  $("results").classList.add("waiting");
  try {
    await task(() => number === latest);
  } catch (error) {
    if (number === latest) say(error.message);
  } finally {
    if (number === latest) $("results").classList.remove("waiting");
  }
}

const ids = (answer) => answer.matches.map((match) => match.id);
let raw = null;  // the answer to the query itself

function ask(event) {
  event?.preventDefault();
  const query = $("query").value;
  return newest(async (current) => {
    if (about.composed && chosen.id === null && !chosen.file)
      throw new Error("Choose a picture first, from the gallery or your own.");
    const pending = search({ query, mode: "rewrite" });
    pending.catch(() => {});  // reported below
    const answer = await search({ query, mode: "raw" });
    if (!current()) return;
    raw = answer;
    $("results").hidden = false;
    $("raw-words").textContent = query;
    show("raw", raw);
    $("rewrite").value = "";
    $("rewritten-matches").replaceChildren();
    $("rewritten-note").textContent = "rewriting ...";
    const rewritten = await pending.finally(() => { $("rewritten-note").textContent = ""; });
    if (!current()) return;
    $("rewrite").value = rewritten.rewrite;
    show("rewritten", rewritten, ids(raw));
  });
}

function searchEdited(event) {
  event.preventDefault();
  return newest(async (current) => {
    const rewrite = $("rewrite").value;
    const answer = await search({ query: raw.query, rewrite, mode: "rewrite" });
    if (current()) show("rewritten", answer, ids(raw));
  });
}

function choose(item, file) {
  chosen.id = file ? null : item.id;
  chosen.file = file || null;
  URL.revokeObjectURL($("chosen").src);
  $("chosen").src = file ? URL.createObjectURL(file) : item.picture;
  $("chosen").hidden = false;
  $("chosen-name").textContent = file ? file.name : item.name;
  if (!file) $("file").value = "";
  say("");
}

async function list(start) {
  const contains = $("contains").value;
  const found = await fetch(`pictures?${new URLSearchParams({ start, contains })}`).then(read);
  if (contains !== $("contains").value) return;
  if (!start) $("pictures").replaceChildren();
  for (const item of found.pictures) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(picture(item), item.name);
    button.addEventListener("click", () => { choose(item); $("gallery").close(); });
    $("pictures").append(button);
  }
  $("more").hidden = $("pictures").childElementCount >= found.total;
}

function addExamples() {
  for (const example of about.examples) {
    const button = document.createElement("button");
    button.type = "button";
    if (example.picture) button.append(picture(example.picture));
    button.append(example.query);
    button.addEventListener("click", () => {
      $("query").value = example.query;
      $("shift").value = example.shift;
      if (example.picture) choose(example.picture);
      ask();
    });
    $("examples").append(button);
  }
}

async function start() {
  try {
    about = await fetch("about").then(read);
  } catch (error) {
    return say(error.message);
  }
  $("query").maxLength = $("rewrite").maxLength = about.text_length;
  $("shift").append(...about.shifts.map((shift) => new Option(shift)));
  $("shift").hidden = about.shifts.length < 2;
  $("picture-row").hidden = !about.composed;
  if (about.composed) $("query-label").textContent = "Words that change the picture";
  addExamples();
  $("ask").addEventListener("submit", ask);
  $("edit").addEventListener("submit", searchEdited);
  $("file").addEventListener("change", () => {
    if ($("file").files.length) choose(null, $("file").files[0]);
  });
  $("choose").addEventListener("click", () => { $("gallery").showModal(); list(0); });
  $("close").addEventListener("click", () => $("gallery").close());
  $("contains").addEventListener("input", () => list(0));
  $("more").addEventListener("click", () => list($("pictures").childElementCount));
  document.body.dataset.ready = "yes";
  $("query").focus();
}

start();
