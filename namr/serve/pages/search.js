// The search page: a query, its plain and its adaptive answer, and the gallery to begin with.

import { listenToControls, options, readControls, settingsOfAddress, takeDefaults } from "./controls.js";
import { complain, filterText, listenToFilter, noteOnFilter, offerFields, readFilter } from "./filter.js";
import { ServiceError, ask, at, element, say } from "./page.js";

const THUMBNAIL_PX = 320;
const NUM_GALLERY = 20;

let release = null;
let query = null; // {key, id, label} of an item, or {file} of an upload
let running = null; // the AbortController of the search under way, its item's look-up included
let gallerySeed = Math.floor(Math.random() * 1e9);
let galleryFilter; // of the items that were asked for last, undefined before
let drawing = null; // the AbortController of the items on their way

const imageOf = (id) => `/items/${id}/image?size_px=${THUMBNAIL_PX}&release=${encodeURIComponent(release.release_id)}`;

function card(item, { rank, distance, moved } = {}) {
  const place = element("li");
  const button = element("button", "card");
  button.type = "button";
  button.dataset.id = item.id;
  button.title = item.key;

  const picture = element("span", "picture");
  const image = element("img");
  image.alt = "";
  image.loading = "lazy";
  image.decoding = "async";
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 64));
  image.addEventListener("error", () => picture.classList.add("lost"));
  image.src = imageOf(item.id);
  picture.append(image);
  if (moved) {
    const badge = element("span", `moved ${moved.kind}`, moved.text);
    badge.title = moved.words;
    picture.append(badge);
  }

  const words = element("span", "words");
  const label = element("span", "label", item.label ?? "no label");
  if (item.label === null) label.classList.add("none");
  if (item.label !== null && query?.label === item.label) label.classList.add("same");
  const second = element("span", "second");
  second.append(element("span", "key", item.key));
  if (distance !== undefined) second.append(element("span", "distance", distance.toFixed(3)));
  words.append(label, second);

  button.append(picture, words);
  const spoken = [rank ? `Number ${rank}:` : "", item.label ?? "no label", item.key];
  if (distance !== undefined) spoken.push(`distance ${distance.toFixed(3)}`);
  if (moved) spoken.push(moved.words);
  button.setAttribute("aria-label", `${spoken.filter(Boolean).join(", ")}. Search with this image`);
  button.addEventListener("click", () => searchByItem(item));
  for (const [begin, end] of [["mouseenter", "mouseleave"], ["focus", "blur"]]) {
    button.addEventListener(begin, () => markTwins(item.id, true));
    button.addEventListener(end, () => markTwins(item.id, false));
  }
  place.append(button);
  return place;
}

function markTwins(id, on) {
  for (const twin of document.querySelectorAll(`#results .card[data-id="${id}"]`)) {
    twin.classList.toggle("twin", on);
  }
}

function movement(rankBefore, rank) {
  if (rankBefore === undefined) return { kind: "new", text: "new", words: "not among the plain neighbours" };
  if (rankBefore === rank) return null;
  const steps = Math.abs(rankBefore - rank);
  return rankBefore > rank
    ? { kind: "up", text: `▲ ${steps}`, words: `moved up ${steps}` }
    : { kind: "down", text: `▼ ${steps}`, words: `moved down ${steps}` };
}

function certaintyInWords(certainty) {
  if (certainty === "proved") return "No other image of the gallery can belong to this list.";
  if (certainty === "calibrated") {
    const rate = (100 * release.calibrated_rate).toPrecision(2);
    return `As sure as held-out queries tell: lists that say so and are wrong are at most ${rate} % of all.`;
  }
  return "An image outside the candidates might belong to this list. Ask for an adaptive depth, or for exact.";
}

function showAnswer(name, answer, rankBefore) {
  const cards = answer.hits.map((hit, index) =>
    card(hit, {
      rank: index + 1,
      distance: hit.distance,
      moved: rankBefore ? movement(rankBefore.get(hit.id), index + 1) : null,
    }),
  );
  at(name).replaceChildren(...(cards.length ? cards : [element("li", "empty", "Nothing was found.")]));
  const badge = at(`${name}-badge`);
  badge.hidden = false;
  badge.textContent = answer.certainty;
  badge.classList.toggle("proved", answer.certainty === "proved");
  badge.classList.toggle("calibrated", answer.certainty === "calibrated");
  badge.title = `${certaintyInWords(answer.certainty)} Nearest of ${answer.depth.toLocaleString()} candidates.`;
  const times = answer.timings;
  const total = times.filter_ms + times.embed_ms + times.first_stage_ms + times.rerank_ms;
  at(`${name}-time`).textContent = `${total < 10 ? total.toFixed(1) : Math.round(total)} ms`;
  at(`${name}-time`).title =
    `embedding ${times.embed_ms.toFixed(1)} ms, first stage ${times.first_stage_ms.toFixed(1)} ms, ` +
    `re-ranking ${times.rerank_ms.toFixed(1)} ms`;
}

function oneSearch(side, signal) {
  if (query.file) {
    const form = new FormData();
    form.append("image", query.file);
    for (const [name, value] of Object.entries(options(side))) form.append(name, value);
    if (filterText()) form.append("filter", filterText());
    return ask("/search/image", { method: "POST", body: form, signal });
  }
  return ask("/search/key", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ key: query.key, ...options(side), filter: JSON.parse(filterText()) }),
    signal,
  });
}

// Of two searches the one that began last is shown, whichever is answered first.
function takeOver() {
  running?.abort();
  running = new AbortController();
  return running.signal;
}

async function search() {
  if (!query || !at("controls").checkValidity()) return;
  const signal = takeOver();
  at("results").classList.add("waiting");
  try {
    const [plain, adaptive] = await Promise.all([
      oneSearch("none", signal),
      oneSearch(at("side").value, signal),
    ]);
    if (signal.aborted) return;
    say("problem", null);
    if (plain.release_id !== release.release_id) {
      await showRelease();
      remember({ isNew: false }); // what is a default may be another
      if (signal.aborted) return;
    }
    showAnswer("plain", plain);
    showAnswer("adaptive", adaptive, new Map(plain.hits.map((hit, index) => [hit.id, index + 1])));
    at("results").hidden = false;
    noteOnFilter(passed(plain));
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem(error);
    noteOnFilter(null);
    at("results").hidden = true;
  } finally {
    if (!signal.aborted) at("results").classList.remove("waiting");
  }
}

// How many images pass the filter, where the answer shows it: it has all of them.
function passed({ hits, certainty }) {
  if (!filterText() || certainty !== "proved" || hits.length >= at("k").valueAsNumber) return null;
  const images = `${query.key === undefined ? "" : "other "}image${hits.length === 1 ? "" : "s"}`;
  return hits.length ? `${hits.length} ${images} pass this filter.` : `No ${images} pass this filter.`;
}

function showProblem(error) {
  if (error.message.startsWith("filter")) complain(error.message);
  else say("problem", error instanceof ServiceError ? error.message : `The page has a fault: ${error.message}`);
}

function showQuery(source, words, detail) {
  const preview = at("preview");
  if (preview.src.startsWith("blob:")) URL.revokeObjectURL(preview.src);
  preview.src = source;
  preview.hidden = false;
  at("drop-hint").hidden = true;
  at("about").replaceChildren(words, element("small", "", detail));
}

function searchByFile(file) {
  if (release && !release.takes_images) {
    showProblem(new ServiceError("This service has no model, so it searches by items of the gallery only."));
    return;
  }
  query = { file };
  remember();
  showQuery(URL.createObjectURL(file), file.name || "Pasted image", "Your image, searched by its embedding");
  at("preview").onerror = () => {
    at("preview").hidden = true;
    at("drop-hint").hidden = false;
  };
  search();
}

function searchByItem(item, { isNew = true } = {}) {
  query = { key: item.key, id: item.id, label: item.label };
  if (isNew) remember();
  const label = item.label === null ? "no label" : `label ${item.label}`;
  showQuery(imageOf(item.id), item.key, `From the gallery, ${label}; left out of its own neighbours`);
  window.scrollTo({ top: 0 });
  search();
}

// Query, filter and controls go into the address, so that they are shared by link and found again by going back.
function remember({ isNew = true } = {}) {
  const parts = [["id", query?.id], ["filter", filterText()], ...settingsOfAddress()].filter(
    ([, value]) => value !== undefined && value !== null,
  );
  const hash = parts.map(([name, value]) => `${name}=${encodeURIComponent(value)}`).join("&");
  const address = location.pathname + (hash && `#${hash}`);
  if (!isNew) history.replaceState(null, "", address);
  else if (address !== location.pathname + location.hash) history.pushState(null, "", address);
}

async function searchByAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  const isOther = [readFilter(address.get("filter")), readControls(address)].some(Boolean);
  if (filterText() !== galleryFilter) showGallery();
  const id = address.get("id");
  if (!/^\d+$/.test(id ?? "")) {
    if (isOther) search();
    return;
  }
  try {
    searchByItem(await ask(`/items/${id}`, { signal: takeOver() }), { isNew: false });
  } catch (error) {
    if (error.name !== "AbortError") showProblem(error);
  }
}

async function showRelease() {
  const [served, described] = await Promise.all([ask("/release"), ask("/fields")]);
  release = served;
  takeDefaults(release);
  offerFields(described.fields, described.num_items === release.num_items);
  const facts = [
    ["release", release.release_id],
    ["model", `${release.model_name} ${release.model_version}`],
    ["images", release.num_items.toLocaleString()],
    ["index", release.index_key],
    ["metric", release.metric],
  ];
  at("release").replaceChildren(
    ...facts.map(([name, value]) => {
      const pair = element("div");
      pair.append(element("dt", "", name), element("dd", "", value));
      return pair;
    }),
  );
}

async function showGallery() {
  drawing?.abort();
  drawing = new AbortController();
  const { signal } = drawing;
  galleryFilter = filterText();
  const asked = new URLSearchParams({ num: NUM_GALLERY, seed: gallerySeed });
  if (galleryFilter) asked.set("filter", galleryFilter);
  try {
    const { items } = await ask(`/items?${asked}`, { signal });
    const none = asked.has("filter") ? "No image of the gallery passes this filter." : "The gallery is empty.";
    at("items").replaceChildren(
      ...(items.length ? items.map((item) => card(item)) : [element("li", "empty", none)]),
    );
  } catch (error) {
    if (error.name === "AbortError") return;
    at("items").replaceChildren();
    showProblem(error);
  }
}

function listen() {
  at("file").addEventListener("change", () => {
    const [file] = at("file").files;
    if (file) searchByFile(file);
    at("file").value = ""; // so that the same file can be chosen again
  });
  let depth = 0;
  const over = (on) => at("drop").classList.toggle("over", on);
  document.addEventListener("dragenter", () => over(++depth > 0));
  document.addEventListener("dragleave", () => over(--depth > 0));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    depth = 0;
    over(false);
    const [file] = event.dataTransfer.files;
    if (file) searchByFile(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((one) => one.type.startsWith("image/"));
    if (file) searchByFile(file);
  });
  at("others").addEventListener("click", () => {
    gallerySeed += 1;
    showGallery();
  });
  const searchAnew = () => {
    if (!release) return; // the address is still to be read
    remember();
    search();
  };
  listenToControls(searchAnew);
  listenToFilter(() => {
    searchAnew();
    showGallery();
  });
}

async function begin() {
  listen();
  try {
    await showRelease();
    window.addEventListener("popstate", searchByAddress);
    await searchByAddress();
  } catch (error) {
    showProblem(error);
  }
}

begin();
