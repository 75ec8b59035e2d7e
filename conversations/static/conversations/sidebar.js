// @ts-check
/* The list of conversations: grouped by age, renamed in place, deleted after a question; a drawer
   on phones. Knows addresses of pages, not what a conversation holds. */

import { deleteConversation, exportPath, listConversations, renameConversation } from "./api.js";
import { ageOf } from "./words.js";

/** @typedef {import("./api.js").Conversation} Conversation */
/**
 * @typedef {object} Actions
 * @property {(id: string) => void} open
 * @property {(conversation: Conversation) => void} renamed
 * @property {(id: string) => void} deleted
 * @property {(error: unknown) => void} failed
 */

const LONGEST_TITLE = 200;
export const UNTITLED = "New chat";

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

export class Sidebar {
  /** @type {Map<string, Conversation>} */ #items = new Map();
  /** @type {string | null} */ #next = null;
  /** @type {string | null} */ #current = null;
  /** @type {string | null} the conversation the menu is about */ #chosen = null;
  #list = /** @type {HTMLElement} */ (byId("list"));
  #menu = /** @type {HTMLElement} */ (byId("menu"));

  /** @param {Actions} actions */
  constructor(actions) {
    this.actions = actions;
    this.#list.addEventListener("click", (event) => this.#onClick(event));
    this.#list.addEventListener("dblclick", (event) => this.#onDoubleClick(event));
    this.#list.addEventListener("keydown", (event) => this.#onKey(event));
    for (const one of this.#menu.querySelectorAll("a")) one.addEventListener("click", () => this.#menu.hidePopover());
    this.#menu.addEventListener("keydown", (event) => walkMenu(this.#menu, event));
    byId("menu-rename").addEventListener("click", () => this.#fromMenu((id) => this.rename(id)));
    byId("menu-delete").addEventListener("click", () => this.#fromMenu((id) => void this.#delete(id)));
  }

  async load() {
    const page = await listConversations();
    this.#items = new Map(page.results.map((one) => [one.id, one]));
    this.#next = page.next;
    this.#draw();
  }

  /** Add one, or bring its title and place up to date. @param {Conversation} conversation */
  put(conversation) {
    const known = this.#items.get(conversation.id);
    if (known && known.title === conversation.title && known.updated_at === conversation.updated_at) return;
    this.#items.set(conversation.id, conversation);
    this.#draw();
  }

  /** @param {string | null} id */
  select(id) {
    this.#current = id;
    for (const link of this.#list.querySelectorAll(".item-link")) {
      const here = link.parentElement?.dataset.id === id;
      if (here) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
  }

  // --- drawing ----------------------------------------------------------------------------------

  #draw() {
    if (this.#list.querySelector("input")) return; // somebody is typing a name
    const sorted = [...this.#items.values()].sort((a, b) => (a.updated_at < b.updated_at ? 1 : -1));
    const parts = [];
    let age = "";
    for (const conversation of sorted) {
      const here = ageOf(conversation.updated_at);
      if (here !== age) parts.push(element("h2", here, "age"));
      age = here;
      parts.push(this.#item(conversation));
    }
    if (!sorted.length) parts.push(element("p", "Your conversations will be listed here.", "list-empty"));
    if (this.#next) parts.push(this.#moreButton());
    this.#list.replaceChildren(...parts);
    this.select(this.#current);
  }

  /** @param {Conversation} conversation */
  #item(conversation) {
    const copy = /** @type {DocumentFragment} */ (byId("t-conversation").content.cloneNode(true));
    const item = /** @type {HTMLElement} */ (copy.firstElementChild);
    const link = /** @type {HTMLAnchorElement} */ (item.querySelector("a"));
    const title = conversation.title || UNTITLED;
    item.dataset.id = conversation.id;
    link.href = `/c/${conversation.id}/`;
    link.textContent = link.title = title;
    item.querySelector("button")?.setAttribute("aria-label", `Menu for “${title}”`);
    return item;
  }

  #moreButton() {
    const button = element("button", "Show older", "quiet list-more");
    button.setAttribute("type", "button");
    button.addEventListener("click", () => void this.#loadMore());
    return button;
  }

  async #loadMore() {
    try {
      const page = await listConversations(this.#next);
      for (const one of page.results) this.#items.set(one.id, one);
      this.#next = page.next;
      this.#draw();
    } catch (error) {
      this.actions.failed(error);
    }
  }

  // --- events -----------------------------------------------------------------------------------

  /** @param {MouseEvent} event */
  #onClick(event) {
    const target = /** @type {Element} */ (event.target);
    const item = /** @type {HTMLElement | null} */ (target.closest(".item"));
    const id = item?.dataset.id;
    if (!id) return;
    const more = target.closest(".item-more");
    if (more) this.#showMenu(more, id);
    if (!target.closest("a") || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    this.actions.open(id);
  }

  /** @param {MouseEvent} event */
  #onDoubleClick(event) {
    const item = /** @type {HTMLElement | null} */ (/** @type {Element} */ (event.target).closest(".item"));
    if (item?.dataset.id) this.rename(item.dataset.id);
  }

  /** @param {KeyboardEvent} event */
  #onKey(event) {
    const item = /** @type {HTMLElement | null} */ (/** @type {Element} */ (event.target).closest(".item"));
    if (!item?.dataset.id || event.target instanceof HTMLInputElement) return;
    if (event.key === "F2") this.rename(item.dataset.id);
    if (event.key === "Delete") void this.#delete(item.dataset.id);
  }

  /** @param {Element} button @param {string} id */
  #showMenu(button, id) {
    this.#chosen = id;
    this.#menu.showPopover();
    byId("menu-markdown").href = exportPath(id, "md");
    byId("menu-json").href = exportPath(id, "json");
    const at = button.getBoundingClientRect();
    const left = Math.min(at.left, innerWidth - this.#menu.offsetWidth - 8);
    const below = at.bottom + 4 + this.#menu.offsetHeight < innerHeight;
    this.#menu.style.left = `${left}px`;
    this.#menu.style.top = `${below ? at.bottom + 4 : at.top - this.#menu.offsetHeight - 4}px`;
    byId("menu-rename").focus();
  }

  /** @param {(id: string) => void} action */
  #fromMenu(action) {
    this.#menu.hidePopover();
    if (this.#chosen) action(this.#chosen);
  }

  // --- changing ---------------------------------------------------------------------------------

  /** Turn the title into a field: Enter keeps, Escape leaves. @param {string} id */
  rename(id) {
    const conversation = this.#items.get(id);
    const link = this.#list.querySelector(`.item[data-id="${CSS.escape(id)}"] a`);
    if (!conversation || !link) return;
    const field = document.createElement("input");
    field.value = conversation.title;
    field.maxLength = LONGEST_TITLE;
    field.className = "item-field";
    field.setAttribute("aria-label", "Title of the conversation");
    let done = false;
    const end = (/** @type {boolean} */ keep) => {
      if (done) return;
      done = true;
      field.replaceWith(link);
      const title = field.value.trim();
      if (keep && title && title !== conversation.title) void this.#rename(conversation, title);
      else this.#draw();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || (event.key !== "Enter" && event.key !== "Escape")) return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    link.replaceWith(field);
    field.select();
  }

  /** @param {Conversation} conversation @param {string} title */
  async #rename(conversation, title) {
    this.put({ ...conversation, title });
    try {
      const stored = await renameConversation(conversation.id, title);
      this.put(stored);
      this.actions.renamed(stored);
    } catch (error) {
      this.put(conversation);
      this.actions.failed(error);
    }
  }

  /** @param {string} id */
  async #delete(id) {
    const title = this.#items.get(id)?.title || UNTITLED;
    if (!(await confirmed(`“${title}” and all its messages will be gone. This cannot be undone.`))) return;
    try {
      await deleteConversation(id);
    } catch (error) {
      if (/** @type {any} */ (error).status !== 404) {
        this.actions.failed(error);
        return;
      }
    }
    this.#items.delete(id);
    this.#draw();
    this.actions.deleted(id);
  }
}

/** Arrows move in a menu. @param {HTMLElement} menu @param {KeyboardEvent} event */
export function walkMenu(menu, event) {
  if (event.key !== "ArrowDown" && event.key !== "ArrowUp") return;
  const items = /** @type {HTMLElement[]} */ ([...menu.querySelectorAll("a, button")]);
  const at = items.findIndex((one) => one === document.activeElement);
  items[(at + (event.key === "ArrowDown" ? 1 : -1) + items.length) % items.length].focus();
  event.preventDefault();
}

/** @param {string} text @returns {Promise<boolean>} */
function confirmed(text) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("confirm"));
  byId("confirm-text").textContent = text;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Open and close the list where it is a drawer. @param {boolean} open */
export function showDrawer(open) {
  const opener = byId("open-sidebar");
  const wasOpen = document.body.classList.contains("drawer");
  document.body.classList.toggle("drawer", open);
  byId("backdrop").hidden = !open;
  byId("main").inert = open;
  opener.setAttribute("aria-expanded", String(open));
  if (open) byId("close-sidebar").focus();
  else if (wasOpen && byId("sidebar").contains(document.activeElement)) opener.focus();
}

/** @param {string} tag @param {string} text @param {string} className */
function element(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}
