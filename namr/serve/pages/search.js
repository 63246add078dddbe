// The search page. Keys, labels and fields are users' data: they reach the page through textContent only.

const at = (id) => document.getElementById(id);
const THUMBNAIL_PX = 320;
const NUM_GALLERY = 20;

let release = null;
let query = null; // {key, id, label} of an item, or {file} of an upload
let running = null; // the AbortController of the search under way
let gallerySeed = Math.floor(Math.random() * 1e9);

class ServiceError extends Error {}

async function ask(path, options = {}) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError("The service doesn't answer. Is it still running?");
  }
  let body = null;
  try {
    body = await reply.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  if (!reply.ok || body === null) {
    throw new ServiceError(body?.error?.message ?? `The service answered with status ${reply.status}.`);
  }
  return body;
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

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
  const proved = answer.certainty === "proved";
  badge.hidden = false;
  badge.textContent = proved ? "proved" : "not proved";
  badge.classList.toggle("proved", proved);
  badge.title = proved
    ? "No other image of the gallery can belong to this list."
    : "An image outside the candidates might belong to this list. Raise the depth, or ask for exact.";
  const times = answer.timings;
  const total = times.filter_ms + times.embed_ms + times.first_stage_ms + times.rerank_ms;
  at(`${name}-time`).textContent = `${total < 10 ? total.toFixed(1) : Math.round(total)} ms`;
  at(`${name}-time`).title =
    `embedding ${times.embed_ms.toFixed(1)} ms, first stage ${times.first_stage_ms.toFixed(1)} ms, ` +
    `re-ranking ${times.rerank_ms.toFixed(1)} ms`;
}

function options(side) {
  const exact = at("exact").checked;
  const chosen = { k: at("k").valueAsNumber, side, exact };
  if (side !== "none" && !exact) chosen.depth = at("depth").valueAsNumber;
  return chosen;
}

function oneSearch(side, signal) {
  if (query.file) {
    const form = new FormData();
    form.append("image", query.file);
    for (const [name, value] of Object.entries(options(side))) form.append(name, value);
    return ask("/search/image", { method: "POST", body: form, signal });
  }
  return ask("/search/key", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ key: query.key, ...options(side) }),
    signal,
  });
}

async function search() {
  if (!query || !at("controls").checkValidity()) return;
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  at("results").classList.add("waiting");
  try {
    const [plain, adaptive] = await Promise.all([
      oneSearch("none", signal),
      oneSearch(at("side").value, signal),
    ]);
    if (signal.aborted) return;
    at("problem").hidden = true;
    if (plain.release_id !== release.release_id) await showRelease();
    showAnswer("plain", plain);
    showAnswer("adaptive", adaptive, new Map(plain.hits.map((hit, index) => [hit.id, index + 1])));
    at("results").hidden = false;
  } catch (error) {
    if (error.name === "AbortError") return;
    showProblem(error);
    at("results").hidden = true;
  } finally {
    if (!signal.aborted) at("results").classList.remove("waiting");
  }
}

function showProblem(error) {
  at("problem").textContent =
    error instanceof ServiceError ? error.message : `The page has a fault: ${error.message}`;
  at("problem").hidden = false;
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
  history.pushState(null, "", location.pathname);
  showQuery(URL.createObjectURL(file), file.name || "Pasted image", "Your image, searched by its embedding");
  at("preview").onerror = () => {
    at("preview").hidden = true;
    at("drop-hint").hidden = false;
  };
  search();
}

function searchByItem(item, { remember = true } = {}) {
  query = { key: item.key, label: item.label };
  if (remember) history.pushState(null, "", `#id=${item.id}`);
  const label = item.label === null ? "no label" : `label ${item.label}`;
  showQuery(imageOf(item.id), item.key, `From the gallery, ${label}; left out of its own neighbours`);
  window.scrollTo({ top: 0 });
  search();
}

async function searchByAddress() {
  const id = /^#id=(\d+)$/.exec(location.hash)?.[1];
  if (id === undefined) return;
  try {
    searchByItem(await ask(`/items/${id}`), { remember: false });
  } catch (error) {
    showProblem(error);
  }
}

async function showRelease() {
  release = await ask("/release");
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
  const { items } = await ask(`/items?num=${NUM_GALLERY}&seed=${gallerySeed}`);
  at("items").replaceChildren(
    ...(items.length ? items.map((item) => card(item)) : [element("li", "empty", "The gallery is empty.")]),
  );
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
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").addEventListener("change", () => {
    at("depth").disabled = at("exact").checked;
    search();
  });
  at("others").addEventListener("click", async () => {
    gallerySeed += 1;
    await showGallery().catch(showProblem);
  });
  window.addEventListener("popstate", searchByAddress);
}

async function begin() {
  listen();
  try {
    await showRelease();
    at("depth").value = release.depth;
    if (release.structure_side !== "none") at("side").value = release.structure_side;
    await Promise.all([showGallery(), searchByAddress()]);
  } catch (error) {
    showProblem(error);
  }
}

begin();
