// @ts-check
/* One conversation as this page knows it: its messages, the answer being written, the question on
   its way. Turns frames into changes of messages and says so to a view; touches no element. */

import { ApiError, createConversation, getConversation, giveFeedback, listMessages } from "./api.js";
import { ChatStream } from "./stream.js";
import { branchThrough } from "./versions.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").Conversation} Conversation */
/** @typedef {import("./api.js").WireError} WireError */
/** @typedef {import("./stream.js").Frame} Frame */
/**
 * @typedef {object} View what a session tells; `session` says which one, it may not be the one shown
 * @property {(session: Session) => void} reset every message may have changed
 * @property {(session: Session, message: Message, before?: string) => void} put a message is new or
 *   different; `before` is the id it was shown under until now
 * @property {(session: Session, message: Message, text: string) => void} append
 * @property {(session: Session, message: Message) => void} finished
 * @property {(session: Session, message: Message) => void} waiting the answer has a place in the queue
 * @property {(notice: string) => void} told what staff tells everybody now; empty: nothing
 * @property {(session: Session) => void} accepted the question is stored: forget the draft
 * @property {(session: Session, error: WireError, text: string) => void} refused nothing is stored
 * @property {(session: Session) => void} changed title, line or running state
 * @property {(session: Session, error: ApiError) => void} broken the conversation cannot be shown
 */

/** @typedef {{ref: string, text: string, sent: boolean, replaces?: string}} Pending a question on its
 * way, or a new version of the message that it replaces */

/** While an answer is written, so much silence makes us look whether it still is. */
const SILENCE_MS = 6_000;
const SILENCE_WITHOUT_LINE_MS = 1_200;
const WATCH_EVERY_MS = 600;
/** @type {WireError} */
const UNSENT = {
  code: "unsent",
  message: "The connection broke before your question arrived. It is back in the field.",
};
/** @type {WireError} */
const UNCHANGED = { code: "unsent", message: "The connection broke. Nothing was changed; please try again." };

export class Session {
  /** @type {Message[]} */ messages = [];
  /** @type {Conversation | null} */ conversation = null;
  /** @type {Message[] | null} the branch of an earlier version, while that is read */ viewing = null;
  /** @type {Pending | null} */ pending = null;
  /** @type {"new" | "loading" | "ready" | "broken"} */ state = "new";
  /** @type {ChatStream | null} */ stream = null;
  /** @type {string} where its draft is kept */ draftKey;
  stopping = false;
  /** Ends when what is stored has been fetched. */ ready = Promise.resolve();
  /** @type {{ref: string, text: string} | null} a question whose line broke: asked again by the same
   * name, it is not asked twice */ #unsent = null;
  #lastSeq = 0;
  #heardAt = 0;
  #lost = false;
  #syncing = false;
  /** @type {number | undefined} */ #watch;

  /** @param {string | null} id null: it exists only here until the first question @param {View} view */
  constructor(id, view) {
    this.id = id;
    this.view = view;
    this.draftKey = id ?? "new";
  }

  /** The answer being written, if any. */
  get running() {
    return this.messages.find((message) => message.status === "streaming") ?? null;
  }

  /** What is to be read: the conversation as it goes on, or an earlier version of it. */
  get shown() {
    return this.viewing ?? this.messages;
  }

  /** Whether a person was asked for who has not answered yet. */
  get awaitsPerson() {
    return this.messages.some(({ hand_over: asked }) => asked?.status === "waiting" || asked?.status === "taken");
  }

  /** Whether a question from the field is on its way. */
  get asking() {
    return this.pending !== null && !this.pending.replaces;
  }

  get busy() {
    return this.pending !== null || this.running !== null;
  }

  /** @returns {import("./stream.js").LineState} */
  get line() {
    return this.stream?.state ?? "open";
  }

  /** Fetch what is stored and join an answer that is being written. */
  load() {
    this.ready = this.#load();
    return this.ready;
  }

  async #load() {
    if (!this.id) return;
    this.state = "loading";
    this.view.changed(this);
    try {
      const [conversation, messages] = await Promise.all([getConversation(this.id), listMessages(this.id)]);
      this.conversation = conversation;
      this.messages = messages;
    } catch (error) {
      this.state = "broken";
      this.view.broken(this, asApiError(error));
      return;
    }
    this.state = "ready";
    this.#connect();
    this.view.reset(this);
    this.#join();
  }

  close() {
    clearInterval(this.#watch);
    this.stream?.close();
    this.stream = null;
  }

  /** @param {string} text */
  async ask(text) {
    this.showNewest();
    const ref = this.#unsent?.text === text ? this.#unsent.ref : newRef();
    this.#unsent = null;
    this.pending = { ref, text, sent: false };
    this.#showPending(ref, text);
    try {
      if (!this.id) await this.#create();
    } catch (error) {
      const { code, message, retryAfterS } = asApiError(error);
      this.#refuse({ code, message, retry_after_s: retryAfterS });
      return;
    }
    if (this.pending?.ref !== ref) return; // stopped meanwhile
    this.#connect();
    this.pending.sent = this.line === "open";
    this.#startWatch();
    this.stream?.ask(text, ref);
    this.view.changed(this);
  }

  /** Stop the answer, or take back a question that has not left. */
  async stop() {
    if (!this.busy || this.stopping) return;
    if (!this.running && (this.stream?.unask() || !this.stream)) {
      this.#refuse({ code: "unsent", message: "" });
      return;
    }
    this.stopping = true;
    this.view.changed(this);
    await this.#cancel();
  }

  /** Wait no longer: have what is known answer. @param {Message} message */
  async hurry(message) {
    if (!message.waiting || message.text) return;
    this.#put({ ...message, waiting: { ...message.waiting, hurried: true } });
    await this.stream?.hurry(message.id);
  }

  /** Have the answer written again in its place. @param {Message} message */
  retry(message) {
    if (this.busy || !this.id) return;
    this.#connect();
    if (!this.stream?.retry(message.id)) {
      const asked = this.messages.filter((one) => one.role === "user" && one.seq < message.seq).at(-1);
      if (asked) void this.ask(asked.text);
      return;
    }
    this.#put({ ...message, status: "streaming", text: "", html: "", error: null, feedback: null });
    this.#startWatch();
  }

  /** Another answer, or the question put differently; what stood there becomes an earlier version.
   * @param {Message} message @param {string | null} text null: another answer */
  replace(message, text) {
    if (this.busy || !this.id) return;
    this.pending = { ref: newRef(), text: "", sent: true, replaces: message.id };
    this.#connect();
    this.#startWatch();
    this.stream?.replace(message.id, text, this.pending.ref);
    this.view.changed(this);
  }

  /** Read the branch of one version. @param {string} id @returns {Promise<boolean>} whether it is there */
  async showVersion(id) {
    if (this.busy || !this.id) return false;
    const live = this.messages.some((one) => one.id === id);
    const branch = live ? null : branchThrough(await listMessages(this.id, { versions: true }), id);
    if (this.busy || branch?.length === 0) return false;
    this.viewing = branch;
    this.view.reset(this);
    this.view.changed(this);
    return true;
  }

  showNewest() {
    if (!this.viewing) return;
    this.viewing = null;
    this.view.reset(this);
    this.view.changed(this);
  }

  /** Judge an answer; the same again takes it back. @param {Message} message @param {"up" | "down"} value */
  async judge(message, value) {
    const before = message.feedback;
    const next = before?.value === value ? null : value;
    this.#put({ ...message, feedback: next && { value: next } });
    try {
      await giveFeedback(message.id, next);
    } catch (error) {
      const now = this.shown.find((one) => one.id === message.id);
      if (now) this.#put({ ...now, feedback: before });
      throw error;
    }
  }

  /** Compare with what is stored: after a lost line, a long silence or a long absence. */
  async sync() {
    if (!this.id || this.#syncing || this.state !== "ready") return;
    this.#syncing = true;
    try {
      this.#merge(await listMessages(this.id));
    } catch {
      return; // the next look may work; the line's own state is on the page already
    } finally {
      this.#syncing = false;
      this.#heardAt = Date.now();
    }
    this.view.reset(this);
    this.#join();
  }

  // --- frames ---------------------------------------------------------------------------------

  /** @param {Frame} frame */
  #onFrame(frame) {
    if (frame.type === "pong") return this.view.told(frame.notice ?? "");
    this.#heardAt = Date.now();
    if (frame.type === "error") return this.#onError(frame);
    if (frame.type === "message.created") return this.#onCreated(frame);
    if (frame.type === "status") return this.#onStatus(frame);
    // Replayed and known. An end without a log (it came before we did) has the number 0.
    if (frame.seq && frame.seq <= this.#lastSeq) return;
    this.#lastSeq = frame.seq || this.#lastSeq;
    if (frame.type === "message.delta") this.#onDelta(frame);
    if (frame.type === "message.completed" || frame.type === "message.failed") this.#onEnd(frame);
  }

  /** @param {Frame} frame */
  #onCreated({ message, user_message: asked, conversation, ref, seq }) {
    if (!message) return;
    this.#lastSeq = seq ?? 0;
    this.#lost = false;
    if (conversation) this.conversation = conversation;
    const mine = this.pending !== null && (!ref || ref === this.pending.ref);
    const before = mine ? this.pending?.ref : undefined;
    this.#makeRoom(asked ?? message);
    if (asked) this.#put(asked, before && `q-${before}`);
    this.#put(message, before && `a-${before}`);
    if (mine) this.#accept();
    this.view.changed(this);
    this.#startWatch();
    if (this.stopping) void this.#cancel();
  }

  /** A new version takes the place of the one before, and of all that followed it.
   * @param {Message} fresh */
  #makeRoom({ id, siblings }) {
    const at = this.messages.findIndex((one) => one.id !== id && siblings.includes(one.id));
    if (at < 0 && !this.viewing) return;
    if (at >= 0) this.messages = this.messages.slice(0, at);
    this.viewing = null;
    this.view.reset(this);
  }

  /** @param {Frame} frame */
  #onStatus({ position, eta_ms: eta = null, seq = 0 }) {
    const message = this.running;
    if (seq && seq <= this.#lastSeq) return;
    this.#lastSeq = seq || this.#lastSeq;
    if (!message || message.text || !position) return;
    const hurried = message.waiting?.hurried;
    const waiting = { position, seconds: eta === null ? null : Math.ceil(eta / 1000), hurried };
    this.#put({ ...message, waiting });
    this.view.waiting(this, { ...message, waiting });
  }

  /** @param {Frame} frame */
  #onDelta({ id, text = "" }) {
    const message = this.messages.find((one) => one.id === id);
    if (!message || message.status !== "streaming") return;
    message.text += text;
    this.view.append(this, message, text);
  }

  /** @param {Frame} frame */
  #onEnd({ message, error }) {
    if (!message) return;
    const ended = error ? { ...message, error } : message;
    const known = this.messages.find((one) => one.id === ended.id);
    // A person may answer, or be on the way, while something else is being written.
    if (!this.running || this.running.id === ended.id) this.stopping = false;
    this.#put(ended);
    if (!known || known.status === "streaming") this.view.finished(this, ended);
    if (this.viewing) this.view.reset(this);
    this.view.changed(this);
  }

  /** @param {Frame} frame */
  #onError({ error, ref }) {
    const wire = error ?? { code: "internal", message: "" };
    if (this.pending && (!ref || ref === this.pending.ref)) this.#refuse(wire);
    else if (!this.busy || wire.code !== "not_found") this.view.refused(this, wire, "");
    // A retry that was refused, or an answer that ended before it could be resumed.
    if (this.running || wire.code === "conflict") void this.sync();
  }

  // --- the line -------------------------------------------------------------------------------

  #connect() {
    if (this.stream || !this.id) return;
    this.stream = new ChatStream(this.id, {
      onFrame: (frame) => this.#onFrame(frame),
      onState: (state) => this.#onState(state),
      onLost: () => this.#onLost(),
      onRefused: (code) => this.#onRefused(code),
    });
    this.stream.open();
  }

  /** @param {import("./stream.js").LineState} state */
  #onState(state) {
    if (state === "open") {
      if (this.#lost) void this.sync();
      else this.#join();
      if (this.pending) this.pending.sent = true;
    }
    if (state === "waiting") this.#lost = this.#lost || this.busy;
    this.view.changed(this);
  }

  #onLost() {
    this.#lost = true;
    void this.sync();
  }

  /** @param {number} code */
  #onRefused(code) {
    this.stream = null;
    const status = code - 4000;
    const words = { 401: "unauthenticated", 403: "permission_denied", 404: "not_found" };
    const name = words[/** @type {keyof typeof words} */ (status)] ?? "http";
    if (this.pending) this.#refuse({ code: name, message: "" });
    this.view.broken(this, new ApiError("", { status, code: name }));
  }

  /** Ask for the running answer's events from where we are. */
  #join() {
    if (!this.running || this.pending) return;
    this.stream?.resume(this.#lastSeq);
    this.#startWatch();
  }

  async #cancel() {
    const message = this.running;
    if (!message || message.id.startsWith("a-")) return; // cancelled as soon as it is created
    try {
      await this.stream?.cancel(message.id);
    } catch {
      void this.sync(); // it had ended
    }
  }

  #startWatch() {
    this.#heardAt = Date.now();
    clearInterval(this.#watch);
    this.#watch = window.setInterval(() => this.#look(), WATCH_EVERY_MS);
  }

  /** An answer whose end was not heard must not be waited for for ever. */
  #look() {
    if (!this.busy) {
      clearInterval(this.#watch);
      return;
    }
    if (this.line !== "open" || (this.pending && !this.pending.sent)) return;
    const patience = this.#lost ? SILENCE_WITHOUT_LINE_MS : SILENCE_MS;
    if (Date.now() - this.#heardAt > patience) void this.sync();
  }

  // --- messages -------------------------------------------------------------------------------

  async #create() {
    this.conversation = await createConversation();
    this.id = this.conversation.id;
    this.state = "ready";
  }

  /** @param {string} ref @param {string} text */
  #showPending(ref, text) {
    const seq = (this.messages.at(-1)?.seq ?? 0) + 1;
    this.#put(local(`q-${ref}`, "user", seq, text));
    this.#put(local(`a-${ref}`, "assistant", seq + 1, ""));
    this.view.changed(this);
  }

  /** @param {Message} message @param {string} [before] */
  #put(message, before) {
    const inEarlier = this.viewing !== null && replaceIn(this.viewing, message, before);
    if (!replaceIn(this.messages, message, before) && !inEarlier) this.messages.push(message);
    if (!this.viewing || inEarlier) this.view.put(this, message, before);
  }

  /** The question did not get in: take it off the page and hand its text back.
   * @param {WireError} error */
  #refuse(error) {
    const pending = this.pending;
    if (!pending) return;
    this.pending = null;
    this.stopping = false;
    this.messages = this.messages.filter((one) => !one.id.endsWith(pending.ref));
    this.view.reset(this);
    this.view.refused(this, error, pending.text);
    this.view.changed(this);
  }

  /** @param {Message[]} stored */
  #merge(stored) {
    const known = new Set(this.messages.map((one) => one.id));
    const ours = this.running;
    const pending = this.pending;
    this.messages = stored;
    if (pending) {
      const { replaces, text } = pending;
      const isIt = (/** @type {Message} */ one) =>
        replaces ? one.siblings.includes(replaces) : one.role === "user" && one.text === text;
      if (stored.some((one) => !known.has(one.id) && isIt(one))) this.#accept();
      else {
        if (!replaces) this.#unsent = { ref: pending.ref, text };
        this.#refuse(replaces ? UNCHANGED : UNSENT);
      }
    }
    for (const one of stored) if (one.author && !known.has(one.id)) this.view.finished(this, one);
    const running = this.running;
    if (!running) this.#settle(ours);
    else if (!this.stream?.bySse) this.#rewind(running, ours);
  }

  /** Its events will bring the text: from where we are, or from the start.
   * @param {Message} running @param {Message | null} ours */
  #rewind(running, ours) {
    if (ours?.id === running.id) {
      running.text = ours.text;
      running.waiting = ours.waiting;
    } else {
      running.text = "";
      this.#lastSeq = 0;
    }
  }

  #accept() {
    this.pending = null;
    this.draftKey = this.id ?? "new";
    this.view.accepted(this);
  }

  /** The answer ended while we were not listening. @param {Message | null} ours */
  #settle(ours) {
    this.stopping = false;
    this.#lost = false;
    const ended = ours && this.messages.find((one) => one.id === ours.id);
    if (ended) this.view.finished(this, ended);
  }
}

/** @param {Message[]} messages @param {Message} message @param {string} [before] the id it had
 * @returns {boolean} whether it was there */
function replaceIn(messages, message, before) {
  const at = messages.findIndex((one) => one.id === message.id || one.id === before);
  if (at >= 0) messages[at] = message;
  return at >= 0;
}

/** @param {string} id @param {"user" | "assistant"} role @param {number} seq @param {string} text
 * @returns {Message} */
function local(id, role, seq, text) {
  return {
    id, role, seq, text, parent: null, siblings: [], shown: true, conversation: "", html: "", route: "", degraded_reason: "",
    status: role === "user" ? "complete" : "streaming", confidence: null, ttft_ms: null, error: null,
    feedback: null,
    created_at: new Date().toISOString(),
  };
}

/** randomUUID exists only on HTTPS and localhost. */
function newRef() {
  return Array.from(crypto.getRandomValues(new Uint32Array(3)), (part) => part.toString(36)).join("");
}

/** @param {unknown} error @returns {ApiError} */
function asApiError(error) {
  return error instanceof ApiError ? error : new ApiError("Something went wrong.", { code: "internal" });
}
