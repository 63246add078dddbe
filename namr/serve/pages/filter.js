// The filter of a search: chips of what is set, and a form for the condition of one field. A condition is kept
// as the service wants it, {"in": [...]} or {"min": ..., "max": ...} by field; links may hold a bare value too.

import { at, element, say } from "./page.js";

const FEW_NUMBERS = 20; // of which a person picks some; of more, a range

let conditions = new Map();
let fields = new Map(); // by name, as the service describes them
let sawAll = false; // whether the values of the fields are those of all images
let choices = []; // {value, box, row} of the values in the form
let changed = () => {};

export function listenToFilter(onChange) {
  changed = onChange;
  at("add-condition").addEventListener("click", () => (at("condition").hidden ? open() : close()));
  at("clear-conditions").addEventListener("click", () => take(new Map()));
  at("cancel-condition").addEventListener("click", close);
  at("field").addEventListener("change", () => showForm(at("field").value));
  at("how").addEventListener("change", showHow);
  at("add-value").addEventListener("click", addTyped);
  at("value").addEventListener("input", () => narrow(at("value").value));
  at("value").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || at("value").value === "") return;
    event.preventDefault();
    addTyped();
  });
  at("condition").addEventListener("keydown", (event) => event.key === "Escape" && close());
  at("condition").addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
}

// The fields that the gallery has; sawEverything: whether their values are all there are.
export function offerFields(described, sawEverything) {
  fields = new Map(described.map((field) => [field.name, field]));
  sawAll = sawEverything;
  const chosen = at("field").value;
  at("field").replaceChildren(
    ...described.map((field) => {
      const isMixed = field.kind === "mixed";
      const option = element("option", "", isMixed ? `${field.name} (of several kinds)` : field.name);
      option.value = field.name;
      option.disabled = isMixed;
      return option;
    }),
  );
  if (fields.has(chosen)) at("field").value = chosen;
  else at("condition").hidden = true; // another release came, without the field
}

// JSON as the service takes it, null where all images are searched.
export function filterText() {
  return conditions.size ? JSON.stringify(Object.fromEntries(conditions)) : null;
}

// Takes the filter of an address; true where it is another than before.
export function readFilter(text) {
  const before = filterText();
  let given = {};
  try {
    given = JSON.parse(text ?? "{}");
    if (given === null || typeof given !== "object" || Array.isArray(given)) throw new SyntaxError();
    complain(null);
  } catch {
    given = {};
    complain("The filter in this address can't be read, so all images are searched.");
  }
  conditions = new Map(Object.entries(given));
  showChips();
  return filterText() !== before;
}

// What is wrong with the filter, null for nothing.
export function complain(message) {
  say("filter-problem", message);
}

// What the last search told of the filter, null for nothing.
export function noteOnFilter(message) {
  say("filter-note", message);
}

const shown = (value) => (value === null ? "no value" : value === "" ? "(empty)" : String(value));
const isRange = (wanted) => wanted !== null && typeof wanted === "object" && !("in" in wanted);

function valuesOf(wanted) {
  if (wanted === null || typeof wanted !== "object") return [wanted];
  return Array.isArray(wanted.in) ? wanted.in : [];
}

function words(wanted, most) {
  if (isRange(wanted)) {
    if (Object.keys(wanted).some((end) => end !== "min" && end !== "max")) return JSON.stringify(wanted);
    const [min, max] = [wanted.min ?? null, wanted.max ?? null];
    if (min === null && max === null) return "any value";
    if (max === null) return `at least ${min}`;
    return min === null ? `at most ${max}` : `${min} to ${max}`;
  }
  const all = valuesOf(wanted).map(shown);
  const [first, rest] = [all.slice(0, most), all.length - most];
  if (rest > 1) return `${first.join(", ")} or ${rest} more`;
  return all.length > 1 ? `${all.slice(0, -1).join(", ")} or ${all.at(-1)}` : (all[0] ?? "nothing");
}

function showChips() {
  at("conditions").replaceChildren(
    ...[...conditions].map(([name, wanted]) => {
      const chip = element("li", "chip");
      const edit = element("button", "edit");
      edit.type = "button";
      edit.append(element("span", "name", `${name}: `), words(wanted, 3));
      edit.title = `${name}: ${words(wanted, Infinity)}`;
      edit.setAttribute("aria-label", `Change the filter ${name}: ${words(wanted, Infinity)}`);
      edit.addEventListener("click", () => open(name));
      const remove = element("button", "remove", "×");
      remove.type = "button";
      remove.title = "Remove";
      remove.setAttribute("aria-label", `Remove the filter ${name}: ${words(wanted, Infinity)}`);
      remove.addEventListener("click", () => {
        const left = new Map(conditions);
        left.delete(name);
        take(left);
      });
      chip.append(edit, remove);
      return chip;
    }),
  );
  at("clear-conditions").hidden = conditions.size < 2;
}

function take(others) {
  conditions = others;
  complain(null);
  noteOnFilter(null);
  showChips();
  close();
  changed();
}

function open(name) {
  const usable = [...fields.values()].filter((field) => field.kind !== "mixed").map((field) => field.name);
  const wanted = usable.includes(name) ? name : (usable.find((each) => !conditions.has(each)) ?? usable[0]);
  at("condition").hidden = false;
  at("add-condition").setAttribute("aria-expanded", "true");
  at("field").value = wanted;
  showForm(wanted);
  at("field").focus();
}

function close() {
  at("condition").hidden = true;
  at("add-condition").focus(); // what had the focus may be gone
  at("add-condition").setAttribute("aria-expanded", "false");
}

function showForm(name) {
  const [field, wanted] = [fields.get(name), conditions.get(name)];
  const asksRange =
    wanted === undefined
      ? field.kind === "number" && (field.values.length === 0 || field.values.length > FEW_NUMBERS)
      : isRange(wanted);
  at("how").value = asksRange ? "range" : "values";
  at("how").parentElement.hidden = field.kind === "boolean";
  for (const end of ["min", "max"]) {
    at(end).value = asksRange ? (wanted?.[end] ?? "") : "";
    at(end).placeholder = field[end] ?? "";
    at(end).inputMode = field.kind === "number" && !(field.min < 0) ? "decimal" : "text";
  }
  at("range-hint").hidden = field.kind !== "text";
  choices = [];
  at("values").replaceChildren();
  const chosen = wanted === undefined || asksRange ? [] : valuesOf(wanted);
  const listed = field.kind === "boolean" ? [false, true] : field.values.map((each) => each.value);
  const counts = new Map(field.values.map((each) => [each.value, each.num_items]));
  listed.sort((a, b) => (field.kind === "text" ? a.localeCompare(b, undefined, { numeric: true }) : a - b));
  for (const value of new Set([...listed, ...chosen.filter((each) => each !== null), null])) {
    addChoice(value, value === null ? field.num_without : (counts.get(value) ?? 0), chosen.includes(value));
  }
  at("typed").hidden = field.kind === "boolean";
  at("value").value = "";
  at("value").placeholder = `find or add a ${field.kind === "number" ? "number" : "value"}`;
  showHow();
}

function showHow() {
  const asksRange = at("how").value === "range";
  at("one-of").hidden = asksRange;
  at("range").hidden = !asksRange;
  if (!at("condition").hidden) complain(null);
}

function addChoice(value, count, isChosen) {
  const row = element("li");
  const label = element("label");
  const box = element("input");
  box.type = "checkbox";
  box.checked = isChosen;
  box.addEventListener("change", () => {
    at("value").value = ""; // it was there to find this one
    narrow("");
  });
  label.append(box, element("span", value === null ? "none" : "", shown(value)));
  if (sawAll) {
    label.append(element("span", "count", count.toLocaleString()));
    box.setAttribute("aria-label", `${shown(value)}, ${count} ${count === 1 ? "image" : "images"}`);
  }
  row.append(label);
  choices.push({ value, box, row });
  at("values").append(row);
  return choices.at(-1);
}

function narrow(text) {
  complain(null);
  for (const { value, row } of choices) {
    row.hidden = text !== "" && !shown(value).toLowerCase().includes(text.toLowerCase());
  }
}

// What a person typed as a value of the field that is chosen, undefined where it is none.
function read(text) {
  if (fields.get(at("field").value).kind === "text") return text;
  const number = text.trim() === "" ? NaN : Number(text);
  if (!Number.isFinite(number)) {
    complain(`“${text}” is no number.`);
    return undefined;
  }
  if (Number.isInteger(number) && !Number.isSafeInteger(number)) {
    complain(`A browser can't tell whole numbers as large as ${text} apart: ask over HTTP.`);
    return undefined;
  }
  return number;
}

// Chooses what was typed, or the only value that it finds; false where it is none.
function addTyped() {
  const text = at("value").value;
  if (text === "") return true;
  const field = fields.get(at("field").value);
  const isListed = sawAll && field.values.length > 0;
  const found = choices.filter(({ value, row }) => value !== null && !row.hidden);
  let choice = choices.find(({ value }) => value !== null && String(value) === text);
  if (!choice && field.kind === "text" && isListed && found.length === 1) [choice] = found;
  if (!choice) {
    const value = read(text);
    if (value === undefined) return false;
    choice = choices.find((each) => each.value === value);
    if (!choice && isListed) {
      complain(`No image has ${field.name} “${text}”.`);
      return false;
    }
    choice ??= addChoice(value, 0, true);
  }
  choice.box.checked = true;
  at("value").value = "";
  narrow("");
  choice.row.scrollIntoView({ block: "nearest" });
  return true;
}

function apply() {
  const name = at("field").value;
  let wanted;
  if (at("how").value === "range") {
    wanted = {};
    for (const end of ["min", "max"]) {
      if (at(end).value === "") continue;
      wanted[end] = read(at(end).value);
      if (wanted[end] === undefined) return at(end).focus();
    }
    if (Object.keys(wanted).length === 0) return complain("Give one end of the range or both.");
    if (wanted.min > wanted.max) return complain("The range ends before it begins.");
  } else {
    if (!addTyped()) return at("value").focus();
    const chosen = choices.filter(({ box }) => box.checked).map(({ value }) => value);
    if (chosen.length === 0) return complain("Choose a value.");
    wanted = { in: chosen };
  }
  take(new Map(conditions).set(name, wanted));
}
