// The controls of a search. Those that differ from the release's defaults go into the address, in the words of
// the HTTP interface: k, side, depth (a number or "adaptive") and exact.

import { at, say } from "./page.js";

const NUM_NEIGHBOURS = 12;
const MOST_SHOWN = 30; // characters of what a link has in place of a setting

let defaults = {}; // by name, as text

export function listenToControls(onChange) {
  at("controls").addEventListener("submit", (event) => event.preventDefault());
  at("controls").addEventListener("change", () => {
    say("controls-problem", null);
    enable();
    if (at("controls").checkValidity()) onChange();
  });
}

// What an address stands for that doesn't say otherwise; the controls stay as they are.
export function takeDefaults(release) {
  const side = release.structure_side === "none" ? "both" : release.structure_side;
  defaults = { k: String(NUM_NEIGHBOURS), side, depth: String(release.depth), exact: "false" };
}

// Names and values of what differs from the defaults.
export function settingsOfAddress() {
  const now = settings();
  return Object.keys(defaults).filter((name) => now[name] !== defaults[name]).map((name) => [name, now[name]]);
}

// Takes the settings of an address; true where they are others than before.
export function readControls(address) {
  const [before, given, wrong] = [JSON.stringify(settings()), { ...defaults }, []];
  for (const name of Object.keys(defaults)) {
    const text = address.get(name);
    const value = text === null ? defaults[name] : READERS[name](text);
    if (value === null) wrong.push(`${name} “${text.slice(0, MOST_SHOWN)}”`);
    else given[name] = value;
  }
  at("k").value = given.k;
  at("side").value = given.side;
  at("deepen").checked = given.depth === "adaptive";
  at("depth").value = given.depth === "adaptive" ? defaults.depth : given.depth;
  at("exact").checked = given.exact === "true";
  enable();
  const taken = wrong.length > 1 ? "they are left at their defaults" : "it is left at its default";
  say("controls-problem", wrong.length ? `This address asks for ${wrong.join(", ")}, which can't be: ${taken}.` : null);
  return JSON.stringify(settings()) !== before;
}

// The options of a search, as the service takes them.
export function options(side) {
  const exact = at("exact").checked;
  const chosen = { k: at("k").valueAsNumber, side, exact };
  if (exact) return chosen;
  if (at("deepen").checked) chosen.depth = "adaptive";
  else if (side !== "none") chosen.depth = at("depth").valueAsNumber;
  return chosen;
}

// Each takes a text of an address and returns the setting, null where it is none.
const READERS = {
  k: (text) => within(at("k"), text),
  side: (text) => ([...at("side").options].some(({ value }) => value === text) ? text : null),
  depth: (text) => (text === "adaptive" ? text : within(at("depth"), text)),
  exact: (text) => (["true", "false"].includes(text) ? text : null),
};

function within(input, text) {
  const number = /^\d+$/.test(text) ? Number(text) : NaN;
  return number >= Number(input.min) && number <= Number(input.max) ? String(number) : null;
}

const shownBy = (input) => within(input, String(input.valueAsNumber));

function settings() {
  return {
    k: shownBy(at("k")) ?? defaults.k,
    side: at("side").value,
    depth: at("deepen").checked ? "adaptive" : (shownBy(at("depth")) ?? defaults.depth),
    exact: String(at("exact").checked),
  };
}

function enable() {
  at("deepen").disabled = at("exact").checked;
  at("depth").disabled = at("exact").checked || at("deepen").checked;
}
