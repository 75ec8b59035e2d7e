// @ts-check
/* Messages as elements: made from the page's template, changed in place, never rebuilt while text
   streams in. Knows how a message looks; not where it comes from. */

import { markIn, unmark } from "./marks.js";
import { versionBeside } from "./versions.js";
import { dayOf, errorWords, fullTimeOf, isLong, origin, personWords, queueWords, timeOf } from "./words.js";

/** @typedef {import("./api.js").Message} Message */

const COPIED_FOR_MS = 1_500;
let tips = 0;

export class MessageList {
  /** @type {Map<string, HTMLElement>} */ #elements = new Map();
  #template = /** @type {HTMLTemplateElement} */ (document.getElementById("t-message"));

  /** @param {HTMLElement} root the log @param {string} name of the assistant */
  constructor(root, name) {
    this.root = root;
    this.name = name;
  }

  /** Show exactly these. @param {Message[]} messages */
  reset(messages) {
    unmark();
    const wanted = new Set(messages.map((message) => message.id));
    for (const [id, element] of this.#elements) {
      if (wanted.has(id)) continue;
      element.remove();
      this.#elements.delete(id);
    }
    for (const message of messages) this.put(message);
    this.#days();
  }

  /** @param {Message} message @param {string} [before] the id it was shown under */
  put(message, before) {
    const known = this.#elements.get(message.id) ?? this.#elements.get(before ?? "");
    const element = known ?? this.#make(message);
    if (before) this.#elements.delete(before);
    this.#elements.set(message.id, element);
    fill(element, message);
    if (!known) {
      this.root.append(element);
      this.#days();
    }
    this.#markLast();
  }

  /** @param {Message} message @param {string} text */
  append(message, text) {
    const element = this.#elements.get(message.id);
    const target = element && find(element, ".text");
    if (!element || !target) return;
    element.classList.remove("waiting");
    if (target.firstChild instanceof Text) target.firstChild.appendData(text);
    else target.append(text);
  }

  /** @param {string} id */
  elementOf(id) {
    return this.#elements.get(id);
  }

  /** Go to a message and mark these words in it. @param {string} id @param {string} words
   * @returns {boolean} whether it is on the page */
  reveal(id, words) {
    const element = this.#elements.get(id);
    if (!element) return false;
    element.scrollIntoView({ block: "center" });
    element.classList.add("found");
    element.tabIndex = -1;
    element.focus({ preventScroll: true });
    element.addEventListener("blur", () => element.classList.remove("found"), { once: true });
    markIn(find(element, ".text"), words);
    return true;
  }

  /** The arrow of a version that was just chosen, or the other one at the end of the row.
   * @param {string} id @param {-1 | 1} step */
  focusArrow(id, step) {
    const element = this.#elements.get(id);
    const arrows = [...(element?.querySelectorAll(".versions button") ?? [])];
    const [wanted, other] = step < 0 ? arrows : arrows.reverse();
    const arrow = /** @type {HTMLButtonElement} */ (wanted).disabled ? other : wanted;
    /** @type {HTMLElement} */ (arrow).focus();
  }

  /** What the reader sees of a message, in words. @param {Message} message */
  wordsOf(message) {
    const element = this.#elements.get(message.id);
    return element ? (find(element, ".text").textContent ?? "").trim() : message.text;
  }

  /** The id of the message an element belongs to. @param {Element} inside */
  idOf(inside) {
    const element = inside.closest(".message");
    return element instanceof HTMLElement ? (element.dataset.id ?? "") : "";
  }

  /** @param {Message} message */
  #make(message) {
    const copy = /** @type {DocumentFragment} */ (this.#template.content.cloneNode(true));
    const element = /** @type {HTMLElement} */ (copy.firstElementChild);
    element.classList.add(message.role);
    find(element, ".who").textContent = message.role === "user" ? "You" : (message.author ?? this.name);
    const tip = find(element, ".tip");
    tip.id = `tip-${(tips += 1)}`;
    find(element, ".why").setAttribute("aria-describedby", tip.id);
    return element;
  }

  /** Only the last answer can be asked for again. */
  #markLast() {
    this.root.querySelector(".message.last")?.classList.remove("last");
    const all = this.root.querySelectorAll(".message");
    all[all.length - 1]?.classList.add("last");
  }

  /** A line between days. */
  #days() {
    this.root.querySelectorAll(".day").forEach((line) => line.remove());
    let shown = "";
    for (const element of this.#elements.values()) {
      const day = dayOf(element.dataset.at ?? "");
      if (day !== shown) element.before(dayLine(day));
      shown = day;
    }
  }
}

/** @param {HTMLElement} element @param {Message} message */
function fill(element, message) {
  const streaming = message.status === "streaming";
  element.dataset.id = message.id;
  element.dataset.at = message.created_at;
  element.dataset.status = message.status;
  element.classList.toggle("waiting", streaming && !message.text);
  element.setAttribute("aria-busy", String(streaming));
  fillQueue(element, message);
  fillText(find(element, ".text"), message);
  find(element, ".person").textContent = personWords(message);
  find(element, ".replies").replaceChildren(...(message.buttons ?? []).map(replyButton));
  fillCaption(element, message);
  fillTrouble(element, message);
}

/** @param {HTMLElement} element @param {Message} message */
function fillQueue(element, { waiting }) {
  find(element, ".queue-words").textContent = waiting ? queueWords(waiting) : "";
  const button = /** @type {HTMLButtonElement} */ (find(element, ".hurry"));
  // Once it is there it stays: what counts down must not take it from under a finger.
  button.hidden = !waiting || (button.hidden && !isLong(waiting));
  button.disabled = waiting?.hurried ?? false;
}

/** @param {HTMLElement} target @param {Message} message */
function fillText(target, message) {
  // The one place where HTML enters the page: sanitised by the server, only of a finished answer.
  const rich = message.role === "assistant" && message.status !== "streaming" && message.html;
  target.classList.toggle("prose", Boolean(rich));
  if (rich) target.innerHTML = message.html;
  else if (target.textContent !== message.text || target.childElementCount) target.textContent = message.text;
}

/** @param {HTMLElement} element @param {Message} message */
function fillCaption(element, message) {
  const { label, tip } = origin(message);
  const why = find(element, ".why");
  why.textContent = label;
  find(element, ".tip").textContent = tip;
  find(element, ".origin").hidden = !label || message.role === "user";
  why.toggleAttribute("disabled", !tip);
  const time = find(element, "time");
  time.setAttribute("datetime", message.created_at);
  time.textContent = timeOf(message.created_at);
  time.title = fullTimeOf(message.created_at);
  find(element, ".copy").hidden = !message.text;
  fillThumbs(element, message);
  fillVersions(find(element, ".versions"), message);
  const question = message.role === "user";
  find(element, ".edit").hidden = !question || !message.shown;
  find(element, ".again").hidden = question || !message.shown || message.status !== "complete" || Boolean(message.author);
  find(element, ".redo").hidden = message.status !== "stopped" || !message.shown;
}

/** @param {HTMLElement} group @param {Message} message */
function fillVersions(group, message) {
  const at = message.siblings.indexOf(message.id) + 1;
  group.hidden = message.siblings.length < 2;
  find(group, ".place").textContent = `${at} / ${message.siblings.length}`;
  group.setAttribute("aria-label", `Version ${at} of ${message.siblings.length}`);
  for (const arrow of group.querySelectorAll("button")) {
    arrow.disabled = versionBeside(message, arrow.dataset.step === "1" ? 1 : -1) === undefined;
  }
}

/** @param {{label: string, text: string}} reply */
function replyButton({ label, text }) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "button small reply";
  button.dataset.text = text;
  button.textContent = label;
  return button;
}

/** @param {HTMLElement} element @param {Message} message */
function fillThumbs(element, message) {
  const thumbs = find(element, ".thumbs");
  thumbs.hidden = message.role === "user" || !message.text;
  for (const thumb of thumbs.querySelectorAll("button")) {
    thumb.setAttribute("aria-pressed", String(thumb.dataset.value === message.feedback?.value));
  }
}

/** @param {HTMLElement} element @param {Message} message */
function fillTrouble(element, message) {
  const trouble = find(element, ".trouble");
  trouble.hidden = message.status !== "failed" && message.status !== "interrupted";
  if (trouble.hidden) return;
  const code = message.status === "interrupted" ? "interrupted" : (message.error?.code ?? "internal");
  find(trouble, "p").textContent = errorWords({ code, message: message.error?.message ?? "" });
  const button = /** @type {HTMLButtonElement} */ (find(trouble, ".retry"));
  countDown(message.error?.retry_after_s ?? 0, (left) => {
    button.disabled = left > 0;
    find(button, "span").textContent = left > 0 ? `Try again in ${left} s` : "Try again";
  });
}

/** Calls back now and every second until nothing is left; stops when told.
 * @param {number} seconds @param {(left: number) => void} tell @returns {() => void} */
export function countDown(seconds, tell) {
  const until = Date.now() + Math.ceil(seconds) * 1000;
  const left = () => Math.max(0, Math.ceil((until - Date.now()) / 1000));
  tell(left());
  const timer = window.setInterval(() => {
    tell(left());
    if (left() === 0) clearInterval(timer);
  }, 1000);
  if (left() === 0) clearInterval(timer);
  return () => clearInterval(timer);
}

/** Put a text on the clipboard and say so on the button. @param {HTMLElement} button @param {string} text */
export async function copy(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyTheOldWay(text); // the clipboard is closed to pages without HTTPS
  }
  const use = button.querySelector("use");
  use?.setAttribute("href", "#i-check");
  button.setAttribute("aria-label", "Copied");
  window.setTimeout(() => {
    use?.setAttribute("href", "#i-copy");
    button.setAttribute("aria-label", "Copy");
  }, COPIED_FOR_MS);
}

/** @param {string} text */
function copyTheOldWay(text) {
  const field = document.createElement("textarea");
  const focused = document.activeElement;
  field.value = text;
  field.className = "hidden";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
  if (focused instanceof HTMLElement) focused.focus();
}

/** @param {string} day */
function dayLine(day) {
  const line = document.createElement("p");
  line.className = "day";
  line.textContent = day;
  return line;
}

/** @param {Element} root @param {string} selector @returns {HTMLElement} */
function find(root, selector) {
  return /** @type {HTMLElement} */ (root.querySelector(selector));
}
