// @ts-check
/* The chat page: wires the composer, the messages, the list and the address bar to sessions. What
   frames mean is known to session.js, how a message looks to messages.js. */

import { ApiError } from "./api.js";
import { draftOf, dropDrafts, keepDraft } from "./drafts.js";
import { Editor } from "./editor.js";
import { Follower, showTheme, toggleTheme } from "./look.js";
import { copy, countDown, MessageList } from "./messages.js";
import { Search } from "./search.js";
import { Session } from "./session.js";
import { showDrawer, Sidebar, UNTITLED, walkMenu } from "./sidebar.js";
import { versionBeside } from "./versions.js";
import { errorWords, queueWords } from "./words.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").WireError} WireError */

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);
const { name = "", maxChars = "4000", login = "" } = document.body.dataset;
const MAX_CHARS = Number(maxChars);
/** The counter appears when this share of the room is used. */
const COUNT_FROM = 0.8;
/** A line that is back sooner was never missed. */
const NOTICE_AFTER_MS = 1_000;
/** A page hidden for longer looks what other tabs did. */
const AWAY_MS = 20_000;
/** While a person is awaited; their answer comes over the socket, unless that has no way to tell. */
const LOOK_FOR_PERSON_MS = 15_000;
const MOST_ANNOUNCED_CHARS = 1_500;

const field = /** @type {HTMLTextAreaElement} */ (byId("composer-text"));
const log = new MessageList(byId("log"), name);
const sidebar = new Sidebar({
  open: (id) => openConversation(id),
  renamed: (conversation) => {
    if (session.id === conversation.id) session.conversation = conversation;
    showTitle();
  },
  deleted: (id) => {
    forget(id);
    if (session.id === id) newChat({ replace: true });
    else focusField();
  },
  failed: (error) => notify(errorWords(asWire(error))),
});

const search = new Search(name, {
  open: (hit) => void openHit(hit),
  left: () => focusField(),
  announce: (text) => announce(text),
  words: (error) => errorWords(asWire(error)),
});
const editor = new Editor(MAX_CHARS, (message, text) => replace(message, text));

/** Conversations that are shown or still being answered, by id. @type {Map<string, Session>} */
const kept = new Map();
const follower = new Follower();
/** Before that an empty field means nothing. */
let draftRestored = false;
/** Until when questions are refused. */
let blockedUntil = 0;
/** @type {() => void} */
let stopNotice = () => {};
/** @type {number | undefined} */
let lineTimer;
/** The answer whose place in the queue was read out. */
let toldToWait = "";

// --- What sessions tell ---------------------------------------------------------------------------

/** @type {import("./session.js").View} */
const view = {
  reset: (one) => {
    if (one !== session) return;
    log.reset(one.shown);
    showPlace();
  },
  put: (one, message, before) => {
    if (one === session) log.put(message, before);
  },
  append: (one, message, text) => {
    if (one === session) log.append(message, text);
  },
  finished: (one, message) => {
    if (one.conversation) sidebar.put({ ...one.conversation, updated_at: new Date().toISOString() });
    if (one !== session) return letGo(one);
    log.put(message);
    announce(spoken(message));
    if (document.activeElement === byId("stop") || document.activeElement === document.body) focusField();
  },
  waiting: (one, message) => {
    if (one !== session || !message.waiting || toldToWait === message.id) return;
    toldToWait = message.id; // once; a voice that counts down would be a nuisance
    announce(queueWords(message.waiting));
  },
  told: (notice) => {
    if ((document.body.dataset.maintenance ?? "") === notice) return;
    if (notice) document.body.dataset.maintenance = notice;
    else delete document.body.dataset.maintenance;
    byId("maintenance").hidden = !notice;
    byId("maintenance-text").textContent = notice;
    announce(notice);
  },
  accepted: (one) => {
    keepDraft("new", "");
    if (one.id) keepDraft(one.id, "");
    if (one.id) kept.set(one.id, one);
    if (one.conversation) sidebar.put(one.conversation);
    if (one !== session) return;
    sidebar.select(one.id);
    if (location.pathname !== pathOf(one)) history.pushState(null, "", pathOf(one));
    saveDraft();
  },
  refused: (one, error, text) => {
    if (one === session) editor.release();
    if (one === session) refuse(error, text);
    else if (text) keepDraft(one.id ?? "new", text);
  },
  changed: (one) => {
    if (one === session) showState();
    else letGo(one);
  },
  broken: (one, error) => {
    if (one.id) kept.delete(one.id);
    if (one === session) showProblem(error);
  },
};

/** @type {Session} */
let session = new Session(null, view);

/** @param {Message} message */
function spoken(message) {
  const { code = message.status, message: text = "" } = message.error ?? {};
  if (message.status === "failed" || message.status === "interrupted") return errorWords({ code, message: text });
  return `${message.author ?? name}: ${log.wordsOf(message).slice(0, MOST_ANNOUNCED_CHARS)}`;
}

/** A conversation that nobody looks at keeps its line only while it is being answered. @param {Session} one */
function letGo(one) {
  if (one === session || one.busy || !one.id) return;
  one.close();
  kept.delete(one.id);
}

/** @param {string} id */
function forget(id) {
  kept.get(id)?.close();
  kept.delete(id);
  keepDraft(id, "");
}

// --- Which conversation is shown ------------------------------------------------------------------

/** @param {Session} next */
function show(next) {
  saveDraft();
  const last = session;
  session = next;
  letGo(last);
  follower.follow();
  clearNotice();
  log.reset(next.shown);
  sidebar.select(next.id);
  showDrawer(false);
  restoreDraft();
  showPlace();
  showState();
  focusField();
}

/** @param {string} id @param {{push?: boolean}} [how] */
function openConversation(id, { push = true } = {}) {
  if (session.id === id && session.state !== "broken") {
    showDrawer(false);
    return;
  }
  const known = kept.get(id);
  const next = known ?? new Session(id, view);
  kept.set(id, next);
  if (push) history.pushState(null, "", pathOf(next));
  show(next);
  if (!known) void next.load().then(() => next === session && next.conversation && sidebar.put(next.conversation));
}

/** @param {{push?: boolean, replace?: boolean}} [how] */
function newChat({ push = true, replace = false } = {}) {
  if (replace) history.replaceState(null, "", "/");
  else if (push && location.pathname !== "/") history.pushState(null, "", "/");
  const fresh = session.id === null && !session.busy;
  show(fresh ? session : new Session(null, view));
}

function openAddress() {
  const id = /^\/c\/([^/]+)\/?$/.exec(location.pathname)?.[1];
  const message = /^#m-([0-9a-f-]+)$/.exec(location.hash)?.[1];
  if (!id) newChat({ push: false });
  else if (message) void openHit({ conversation: decodeURIComponent(id), message, words: "" }, { push: false });
  else openConversation(decodeURIComponent(id), { push: false });
}

/** @param {import("./search.js").Hit} hit @param {{push?: boolean}} [how] */
async function openHit({ conversation, message, words }, how) {
  openConversation(conversation, how);
  const one = session;
  await one.ready;
  if (one !== session || one.state !== "ready" || !message) return;
  try {
    const here = one.shown.some((known) => known.id === message) || (await one.showVersion(message));
    follower.leave();
    if (!here || !log.reveal(message, words)) notify("This message cannot be shown now.");
  } catch (error) {
    notify(errorWords(asWire(error)));
  }
}

/** @param {Session} one */
function pathOf(one) {
  return one.id ? `/c/${one.id}/` : "/";
}

// --- What the page shows --------------------------------------------------------------------------

function showPlace() {
  const empty = session.shown.length === 0;
  byId("problem").hidden = session.state !== "broken";
  byId("loading").hidden = session.state !== "loading";
  byId("empty").hidden = !empty || session.state === "loading" || session.state === "broken";
  byId("log").hidden = empty;
  showTitle();
}

function showTitle() {
  const title = session.conversation?.title ?? "";
  byId("title").textContent = title;
  document.title = session.id && session.messages.length ? `${title || UNTITLED} · ${name}` : name;
}

function showState() {
  const { busy, stopping } = session;
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  byId("stop").disabled = stopping;
  byId("log").classList.toggle("busy", busy);
  byId("earlier").hidden = session.viewing === null;
  showPlace();
  showCounter();
  showLine();
}

function showLine() {
  const bar = byId("connection");
  const offline = !navigator.onLine;
  const missing = offline || session.line === "waiting";
  clearTimeout(lineTimer);
  if (!missing) {
    bar.hidden = true;
    return;
  }
  byId("connection-text").textContent = offline
    ? "You are offline. What you type is kept."
    : "Reconnecting… What you type is kept.";
  lineTimer = window.setTimeout(() => (bar.hidden = false), offline ? 0 : NOTICE_AFTER_MS);
}

/** @param {ApiError} error */
function showProblem(error) {
  const missing = error.status === 404;
  const signedOut = error.status === 401 || error.status === 403;
  const box = byId("problem");
  box.querySelector("h2").textContent = missing
    ? "This conversation is not here"
    : signedOut ? "Please sign in" : "This conversation cannot be loaded";
  box.querySelector("p").textContent = missing
    ? "It was deleted, or it belongs to somebody else."
    : signedOut ? "You are signed out. What you typed is kept in this tab."
    : errorWords({ code: error.code, message: error.message });
  const action = missing
    ? button("New chat", () => newChat())
    : signedOut ? link("Sign in", `${login}?next=${encodeURIComponent(location.pathname)}`)
    : button("Try again", () => void session.load());
  box.querySelector(".problem-actions").replaceChildren(action);
  session.state = "broken";
  log.reset([]);
  session.messages = [];
  session.viewing = null;
  showState();
  announce(box.querySelector("h2").textContent);
}

/** @param {string} text */
function announce(text) {
  byId("announce").textContent = text;
}

/** @param {WireError} error @param {string} text the question, if it was one that did not get in */
function refuse(error, text) {
  if (text) {
    const typed = field.value.trim() ? `\n${field.value}` : "";
    setField(text + typed);
    focusField();
  }
  if (error.code === "unauthenticated") return showProblem(new ApiError("", { status: 401, code: error.code }));
  if (error.code === "unsent" && !error.message) return;
  const wait = error.retry_after_s ?? 0;
  if (wait > 0) blockedUntil = Date.now() + wait * 1000;
  notify(errorWords(error), wait);
}

/** @param {string} text @param {number} [seconds] until it may be tried again */
function notify(text, seconds = 0) {
  stopNotice();
  announce(text);
  byId("notice").hidden = false;
  stopNotice = countDown(seconds, (left) => {
    byId("notice-text").textContent = left > 0 ? `${text} You can go on in ${left} s.` : text;
    showCounter();
    if (seconds > 0 && left === 0) clearNotice();
  });
}

function clearNotice() {
  stopNotice();
  byId("notice").hidden = true;
}

// --- The composer ---------------------------------------------------------------------------------

function send() {
  const text = field.value.trim();
  if (!text || text.length > MAX_CHARS || !mayAsk()) return;
  keepDraft(session.draftKey, text); // until the server has it
  setField("");
  ask(text);
}

function mayAsk() {
  return !session.busy && Date.now() >= blockedUntil && session.state !== "loading" && session.state !== "broken";
}

/** @param {string} text */
function ask(text) {
  clearNotice();
  follower.follow();
  void session.ask(text);
  showPlace();
  focusField();
}

function stop() {
  void session.stop();
}

/** @param {string} text */
function setField(text) {
  field.value = text;
  grow();
  showCounter();
}

function grow() {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function showCounter() {
  const length = field.value.trim().length;
  const counter = byId("counter");
  const over = length > MAX_CHARS;
  counter.textContent = length >= MAX_CHARS * COUNT_FROM
    ? `${length.toLocaleString("en")} / ${MAX_CHARS.toLocaleString("en")}` : "";
  counter.classList.toggle("over", over);
  field.setAttribute("aria-invalid", String(over));
  const closed = session.state === "loading" || session.state === "broken";
  byId("send").disabled = !length || over || closed || Date.now() < blockedUntil;
}

/** On a touch screen focus would bring up the keyboard unasked. */
function focusField() {
  if (!matchMedia("(pointer: coarse)").matches) field.focus();
}

// --- Drafts: what was typed outlives a reload, a failure and a change of conversation -----------------

function saveDraft() {
  if (session.asking || !draftRestored) return; // the question on its way is the draft
  keepDraft(session.draftKey, field.value);
}

function restoreDraft() {
  setField(session.asking ? "" : draftOf(session.draftKey));
  draftRestored = true;
}

// --- Small things -----------------------------------------------------------------------------------

/** @param {string} text @param {() => void} action */
function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.className = "button primary";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

/** @param {string} text @param {string} href */
function link(text, href) {
  const made = document.createElement("a");
  made.className = "button primary";
  made.textContent = text;
  made.href = href;
  return made;
}

/** @param {unknown} error @returns {WireError} */
function asWire(error) {
  if (!(error instanceof ApiError)) return { code: "internal", message: "" };
  return { code: error.code, message: error.message, retry_after_s: error.retryAfterS };
}

// --- Events -----------------------------------------------------------------------------------------

/** @param {MouseEvent} event */
function onLogClick(event) {
  const target = /** @type {Element} */ (event.target).closest("button");
  const message = target && session.shown.find((one) => one.id === log.idOf(target));
  if (!target || !message) return;
  if (target.matches(".hurry")) void hurry(message);
  if (target.matches(".copy")) void copy(target, message.text);
  if (target.matches(".thumb")) void judge(message, target.dataset.value === "up" ? "up" : "down");
  if (target.matches(".edit")) edit(message);
  if (target.matches(".reply") && mayAsk()) ask(target.dataset.text ?? "");
  if (target.matches(".versions button")) void turnTo(message, target.dataset.step === "1" ? 1 : -1);
  if (target.matches(".again")) {
    replace(message, null);
    focusField();
  }
  if (target.matches(".retry, .redo")) {
    follower.follow();
    session.retry(message);
    focusField();
  }
}

/** @param {Message} message @param {string | null} text null: another answer */
function replace(message, text) {
  clearNotice();
  follower.follow();
  session.replace(message, text);
}

/** @param {Message} message */
async function hurry(message) {
  focusField();
  try {
    await session.hurry(message);
  } catch (error) {
    notify(errorWords(asWire(error)));
  }
}

/** @param {Message | undefined} question */
function edit(question) {
  const element = question && log.elementOf(question.id);
  if (!element || session.busy || session.viewing) return;
  const last = session.messages.findLast((one) => one.role === "user");
  editor.open(element, question, last?.id === question.id);
}

/** Show the version beside. @param {Message} message @param {-1 | 1} step */
async function turnTo(message, step) {
  const id = versionBeside(message, step);
  if (!id) return;
  follower.leave();
  try {
    if (!(await session.showVersion(id))) return;
  } catch (error) {
    notify(errorWords(asWire(error)));
    return;
  }
  log.focusArrow(id, step);
  const place = message.siblings.indexOf(id) + 1;
  announce(`Version ${place} of ${message.siblings.length}: ${log.wordsOf({ ...message, id }).slice(0, MOST_ANNOUNCED_CHARS)}`);
}

/** @param {Message} message @param {"up" | "down"} value */
async function judge(message, value) {
  const given = message.feedback?.value !== value;
  try {
    await session.judge(message, value);
    announce(given ? "Thank you for telling us." : "Taken back.");
  } catch (error) {
    notify(errorWords(asWire(error)));
  }
}

/** @param {KeyboardEvent} event */
function onKey(event) {
  if (event.isComposing || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && !event.altKey && event.key.toLowerCase() === "k") {
    event.preventDefault();
    newChat();
  } else if (event.key === "Escape") {
    if (document.querySelector(":popover-open")) return; // the browser closes it
    if (document.body.classList.contains("drawer")) showDrawer(false);
    else if (session.busy) stop();
    else if (session.viewing) session.showNewest();
    else if (document.activeElement?.matches(".why, .message")) field.focus();
  } else if (!isTyping()) onLetter(event);
}

function isTyping() {
  return document.activeElement?.matches("input, textarea, select") ?? false;
}

/** Keys that mean a letter while somebody types. @param {KeyboardEvent} event */
function onLetter(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/") openSearch();
  else if (event.key === "?") byId("keys").showModal();
  else return;
  event.preventDefault();
}

function openSearch() {
  if (getComputedStyle(byId("sidebar")).visibility === "hidden") showDrawer(true);
  search.focus();
}

/** @param {KeyboardEvent} event */
function onFieldKey(event) {
  if (event.key === "ArrowUp" && !field.value && !event.shiftKey) {
    event.preventDefault();
    edit(session.messages.findLast((one) => one.role === "user"));
    return;
  }
  // 229: some browsers end a composition with an Enter that does not say so.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
}

/** @param {MouseEvent} event */
function onNew(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  newChat();
}

function onVisible() {
  if (document.visibilityState === "hidden") {
    hiddenAt = Date.now();
  } else if (Date.now() - hiddenAt > AWAY_MS) {
    void sidebar.load().catch(() => {}); // what is shown stays; the next action will tell
    if (!session.busy) void session.sync();
  }
}
let hiddenAt = Date.now();

function lookForPerson() {
  if (session.awaitsPerson && !session.busy && document.visibilityState === "visible") void session.sync();
}

function start() {
  byId("composer").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    send();
  });
  byId("stop").addEventListener("click", stop);
  field.addEventListener("keydown", onFieldKey);
  field.addEventListener("input", () => {
    grow();
    showCounter();
    saveDraft();
  });
  byId("log").addEventListener("click", onLogClick);
  byId("jump").addEventListener("click", () => {
    follower.follow();
    focusField();
  });
  document.querySelector(".account form")?.addEventListener("submit", () => {
    draftRestored = false;
    dropDrafts();
  });
  byId("notice-close").addEventListener("click", clearNotice);
  byId("theme").addEventListener("click", toggleTheme);
  byId("show-keys").addEventListener("click", () => byId("keys").showModal());
  byId("newest").addEventListener("click", () => {
    session.showNewest();
    follower.follow();
    focusField();
  });
  const account = byId("account-menu");
  account.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => walkMenu(account, event));
  byId("title").addEventListener("dblclick", () => session.id && sidebar.rename(session.id));
  byId("open-sidebar").addEventListener("click", () => showDrawer(true));
  byId("close-sidebar").addEventListener("click", () => showDrawer(false));
  byId("backdrop").addEventListener("click", () => showDrawer(false));
  for (const one of document.querySelectorAll("[data-new]")) {
    one.addEventListener("click", (event) => onNew(/** @type {MouseEvent} */ (event)));
  }
  for (const one of document.querySelectorAll("[data-example]")) {
    one.addEventListener("click", () => {
      setField(one.textContent ?? "");
      send();
    });
  }
  document.addEventListener("keydown", onKey);
  document.addEventListener("visibilitychange", onVisible);
  window.addEventListener("popstate", openAddress);
  window.setInterval(lookForPerson, LOOK_FOR_PERSON_MS);
  window.addEventListener("online", showLine);
  window.addEventListener("offline", showLine);
  window.addEventListener("pagehide", saveDraft);
  if (/Mac|iPhone|iPad/.test(navigator.platform)) byId("new-keys").textContent = "⌘ K";
  showTheme();
  openAddress();
  sidebar.load().catch((error) => refuse(asWire(error), ""));
}

start();
