// @ts-check
/* Versions of messages as a tree: which branch goes through one of them. Pure; fetches nothing and
   knows no page. */

/** @typedef {import("./api.js").Message} Message */

/**
 * What led to that version, the version, and of all that followed it the newest.
 * @param {Message[]} all of one conversation, oldest first, replaced ones included @param {string} id
 * @returns {Message[]} nothing, if it is not among them
 */
export function branchThrough(all, id) {
  const known = new Map(all.map((one) => [one.id, one]));
  const newestAfter = new Map(all.map((one) => [one.parent, one])); // the last of a parent stays
  /** @type {Set<Message>} a set, so that rows in a ring cannot keep us */
  const before = new Set();
  let one = known.get(id);
  for (; one && !before.has(one); one = known.get(one.parent ?? "")) before.add(one);
  const branch = new Set([...before].reverse());
  for (one = newestAfter.get(id); one && !branch.has(one); one = newestAfter.get(one.id)) branch.add(one);
  return [...branch];
}

/**
 * The version before or after, if there is one.
 * @param {Message} message @param {-1 | 1} step @returns {string | undefined}
 */
export function versionBeside(message, step) {
  const at = message.siblings.indexOf(message.id);
  return at < 0 ? undefined : message.siblings[at + step];
}
