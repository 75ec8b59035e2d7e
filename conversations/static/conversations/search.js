// @ts-check
/* Search in one's own messages: the field above the list of conversations and the results in the
   list's place. Arrows walk, Enter opens, Escape closes. What opening means is not known here. */

import { searchConversations, searchMessages } from "./api.js";
import { excerpt, places } from "./marks.js";
import { UNTITLED } from "./sidebar.js";
import { dayOf } from "./words.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").Conversation} Conversation */
/** @typedef {{conversation: string, message: string | null, words: string}} Hit `message` null: the title */
/**
 * @typedef {object} Actions
 * @property {(hit: Hit) => void} open
 * @property {() => void} left Escape in an empty field
 * @property {(text: string) => void} announce
 * @property {(error: unknown) => string} words what went wrong, for people
 */

const PAUSE_MS = 250;
const SHORTEST = 2;

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

export class Search {
  /** @type {AbortController | null} */ #request = null;
  /** @type {number | undefined} */ #timer;
  /** @type {Map<string, string>} titles of conversations with a result */ #titles = new Map();
  #words = "";
  #field = /** @type {HTMLInputElement} */ (byId("search"));
  #hits = /** @type {HTMLElement} */ (byId("hits"));

  /** @param {string} name of the assistant @param {Actions} actions */
  constructor(name, actions) {
    this.name = name;
    this.actions = actions;
    this.#field.addEventListener("input", () => this.#soon());
    byId("search-box").addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => this.#onKey(event));
    this.#hits.addEventListener("click", (event) => this.#onClick(event));
  }

  focus() {
    this.#field.focus();
    this.#field.select();
  }

  close() {
    this.#cancel();
    this.#field.value = this.#words = "";
    this.#hits.hidden = true;
    this.#hits.replaceChildren();
    byId("list").hidden = false;
  }

  // --- asking -----------------------------------------------------------------------------------

  #cancel() {
    clearTimeout(this.#timer);
    this.#request?.abort();
    this.#request = null;
  }

  /** When the typing pauses. */
  #soon() {
    this.#cancel();
    const words = this.#field.value.trim();
    if (words.length < SHORTEST) {
      const typed = this.#field.value;
      this.close();
      this.#field.value = typed;
      return;
    }
    this.#timer = window.setTimeout(() => void this.#find(words), PAUSE_MS);
  }

  /** @param {string} words */
  async #find(words) {
    this.#cancel();
    const { signal } = (this.#request = new AbortController());
    this.#words = words;
    try {
      const [page, talks] = await Promise.all([searchMessages(words, signal), searchConversations(words, signal)]);
      this.#titles = new Map(talks.results.map((one) => [one.id, one.title || UNTITLED]));
      const titled = talks.results.filter((one) => places(one.title, words).length);
      this.#show([...titled.map((one) => this.#titleHit(one)), ...page.results.map((one) => this.#hit(one))]);
      this.#offerMore(page.next);
      this.actions.announce(this.#told(titled.length + page.results.length, page.next));
    } catch (error) {
      if (!signal.aborted) this.#fail(error);
    }
  }

  /** @param {string} next */
  async #more(next) {
    const { signal } = (this.#request = new AbortController());
    try {
      const page = await searchMessages(this.#words, signal, next);
      const first = this.#hits.children.length;
      this.#hits.append(...page.results.map((one) => this.#hit(one)));
      this.#offerMore(page.next);
      this.#hits.children[first]?.querySelector("a")?.focus();
    } catch (error) {
      if (!signal.aborted) this.#fail(error);
    }
  }

  // --- drawing ----------------------------------------------------------------------------------

  /** @param {Element[]} items */
  #show(items) {
    const nothing = [`Nothing has the words “${this.#words}”.`, "Try fewer words, or another form of them."];
    this.#hits.replaceChildren(...(items.length ? items : nothing.map(note)));
    this.#hits.hidden = false;
    this.#hits.scrollTop = 0;
    byId("list").hidden = true;
  }

  /** @param {unknown} error */
  #fail(error) {
    const text = this.actions.words(error);
    this.#show([note(text)]);
    this.actions.announce(text);
  }

  /** @param {number} count @param {string | null} next */
  #told(count, next) {
    if (!count) return "Nothing found.";
    return `${next ? "More than " : ""}${count} ${count === 1 ? "place" : "places"} found. Arrow down reads them.`;
  }

  /** @param {string | null} next */
  #offerMore(next) {
    if (!next) return;
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.className = "quiet list-more";
    button.textContent = "Show older";
    button.addEventListener("click", () => {
      item.remove();
      void this.#more(next);
    });
    item.append(button);
    this.#hits.append(item);
  }

  /** @param {Conversation} talk */
  #titleHit(talk) {
    return this.#item({ conversation: talk.id, message: null }, talk.title, "", dayOf(talk.updated_at));
  }

  /** @param {Message} message */
  #hit(message) {
    const title = this.#titles.get(message.conversation) ?? UNTITLED;
    const older = message.shown ? "" : ", earlier version";
    const place = { conversation: message.conversation, message: message.id };
    return this.#item(place, title, message.text, `${this.#who(message)}${older} · ${dayOf(message.created_at)}`);
  }

  /** @param {Message} message */
  #who(message) {
    return message.role === "user" ? "You" : this.name;
  }

  /** @param {{conversation: string, message: string | null}} place @param {string} title
   * @param {string} text @param {string} when */
  #item({ conversation, message }, title, text, when) {
    const copy = /** @type {DocumentFragment} */ (byId("t-hit").content.cloneNode(true));
    const item = /** @type {HTMLElement} */ (copy.firstElementChild);
    const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
    link.href = `/c/${conversation}/${message ? `#m-${message}` : ""}`;
    Object.assign(link.dataset, { conversation, message: message ?? "" });
    const [top, said, foot] = /** @type {HTMLElement[]} */ ([...link.children]);
    top.append(...(text ? [title] : marked(title, this.#words)));
    said.append(...marked(text, this.#words));
    said.hidden = !text;
    foot.textContent = when;
    return item;
  }

  // --- events -----------------------------------------------------------------------------------

  /** @param {MouseEvent} event */
  #onClick(event) {
    const link = /** @type {HTMLElement | null} */ (/** @type {Element} */ (event.target).closest("a.hit"));
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const { conversation = "", message = "" } = link.dataset;
    for (const one of this.#hits.querySelectorAll("[aria-current]")) one.removeAttribute("aria-current");
    link.setAttribute("aria-current", "true");
    this.actions.open({ conversation, message: message || null, words: this.#words });
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    if (event.isComposing || event.ctrlKey || event.metaKey || event.altKey) return;
    const act = { ArrowDown: () => this.#step(1), ArrowUp: () => this.#step(-1), Escape: () => this.#escape() };
    const inField = event.target === this.#field;
    if (event.key in act) act[/** @type {keyof typeof act} */ (event.key)]();
    else if (event.key === "Enter" && inField) this.#openFirst();
    else return;
    event.preventDefault();
  }

  /** Links of results and the field are one ring. @param {1 | -1} by */
  #step(by) {
    const ring = /** @type {HTMLElement[]} */ ([this.#field, ...this.#hits.querySelectorAll("a, button")]);
    const at = ring.findIndex((one) => one === document.activeElement);
    ring[(at + by + ring.length) % ring.length].focus();
  }

  #openFirst() {
    const words = this.#field.value.trim();
    const first = /** @type {HTMLElement | null} */ (this.#hits.querySelector("a"));
    if (first && words === this.#words) first.click();
    else if (words.length >= SHORTEST) void this.#find(words); // Enter was faster than the pause
  }

  #escape() {
    const empty = !this.#field.value;
    this.close();
    if (empty) this.actions.left();
    else this.#field.focus();
  }
}

/** @param {string} text @param {string} words @returns {(string | Node)[]} */
function marked(text, words) {
  return excerpt(text, words).map((piece) => {
    if (!piece.found) return piece.text;
    const mark = document.createElement("mark");
    mark.textContent = piece.text;
    return mark;
  });
}

/** @param {string} text */
function note(text) {
  const item = document.createElement("li");
  item.className = "list-empty";
  item.textContent = text;
  return item;
}
