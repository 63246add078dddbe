// What the scripts of the page share. Keys, labels and fields are users' data: they reach the page through
// textContent only.

export const at = (id) => document.getElementById(id);

export class ServiceError extends Error {}

export async function ask(path, options = {}) {
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

export function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// Shows a line of words, null for none.
export function say(id, words) {
  at(id).textContent = words ?? "";
  at(id).hidden = words === null;
}
