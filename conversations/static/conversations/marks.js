// @ts-check
/* Where the words of a search are in a text: for excerpts of results and for marks in a message.
   Finds what the database found, by the beginnings of words; knows nothing of the search itself. */

const MOST_PLACES = 200;
const ROOM_BEFORE = 36;
const ROOM = 150;
/** Endings that the database's English search ignores, too. */
const ENDINGS = /(?:ies|ing|ed|es|s|y|e)$/u;
const SHORTEST_STEM = 3;

/**
 * From where to where, in order, at most 200.
 * @param {string} text @param {string} query as it was typed @returns {[number, number][]}
 */
export function places(text, query) {
  const stems = query.split(/[^\p{L}\p{N}_@.+]+/u).filter(Boolean).map(stemOf);
  if (!stems.length) return [];
  const any = stems.sort((a, b) => b.length - a.length).map(literal).join("|");
  /** @type {[number, number][]} */
  const found = [];
  for (const hit of text.matchAll(new RegExp(`(?:${any})[\\p{L}\\p{N}]*`, "giu"))) {
    found.push([hit.index, hit.index + hit[0].length]);
    if (found.length === MOST_PLACES) break;
  }
  return found;
}

/**
 * The part of a text around the first place found, in pieces.
 * @param {string} text with Markdown or without @param {string} query
 * @returns {{text: string, found: boolean}[]}
 */
export function excerpt(text, query) {
  const plain = text.replace(/[*`#>]+/g, "").replace(/\s+/g, " ").trim();
  const all = places(plain, query);
  const start = startOf(plain, all[0]?.[0] ?? 0);
  const end = Math.min(plain.length, start + ROOM);
  const pieces = piecesOf(plain, all, start, end);
  if (start > 0) pieces.unshift({ text: "… ", found: false });
  if (end < plain.length) pieces.push({ text: "…", found: false });
  return pieces;
}

/** Mark the words in an element's text without touching the element.
 * @param {Element} root @param {string} query */
export function markIn(root, query) {
  if (!("highlights" in CSS)) return; // an older browser shows the message, just without marks
  const ranges = [];
  const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  for (let node = walk.nextNode(); node; node = walk.nextNode()) {
    for (const [from, to] of places(node.textContent ?? "", query)) ranges.push(rangeOf(node, from, to));
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

export function unmark() {
  if ("highlights" in CSS) CSS.highlights.delete("found");
}

/** @param {Node} node @param {number} from @param {number} to */
function rangeOf(node, from, to) {
  return new StaticRange({ startContainer: node, startOffset: from, endContainer: node, endOffset: to });
}

/** A little before the place, at the beginning of a word. @param {string} text @param {number} place */
function startOf(text, place) {
  if (place <= ROOM_BEFORE) return 0;
  const space = text.indexOf(" ", place - ROOM_BEFORE);
  return space < 0 || space >= place ? place : space + 1;
}

/** @param {string} text @param {[number, number][]} all @param {number} start @param {number} end */
function piecesOf(text, all, start, end) {
  const pieces = [];
  let at = start;
  for (const [from, to] of all.filter((one) => one[0] >= start && one[1] <= end)) {
    pieces.push({ text: text.slice(at, from), found: false }, { text: text.slice(from, to), found: true });
    at = to;
  }
  pieces.push({ text: text.slice(at, end), found: false });
  return pieces.filter((piece) => piece.text);
}

/** @param {string} word */
function stemOf(word) {
  const stem = word.replace(ENDINGS, "");
  return stem.length >= SHORTEST_STEM ? stem : word;
}

/** @param {string} text */
function literal(text) {
  return text.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&");
}
