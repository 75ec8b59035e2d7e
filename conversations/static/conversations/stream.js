// @ts-check
/* One conversation's line to the server: a WebSocket that comes back by itself, or, where sockets
   are blocked, server-sent events over fetch. Frames go out and come in the same way in both cases;
   what they mean is not known here. */

import { ApiError, cancelMessage, hurryMessage, postQuestion, postVersion } from "./api.js";

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").Conversation} Conversation */
/** @typedef {import("./api.js").WireError} WireError */
/**
 * @typedef {object} Frame
 * @property {string} type
 * @property {number} [seq]
 * @property {string} [id]
 * @property {string} [text]
 * @property {string | null} [ref]
 * @property {Message} [message]
 * @property {Message | null} [user_message]
 * @property {Conversation} [conversation]
 * @property {WireError} [error]
 * @property {number} [position] in the queue, 1: next
 * @property {number | null} [eta_ms]
 * @property {string} [notice] what staff tells everybody, in a pong
 */
/** @typedef {"connecting" | "open" | "waiting" | "closed"} LineState */
/**
 * @typedef {object} Listener
 * @property {(frame: Frame) => void} onFrame
 * @property {(state: LineState) => void} onState
 * @property {() => void} onLost an answer's event stream ended before the answer did
 * @property {(code: number) => void} onRefused the server closed for a reason that will not pass
 */

const FIRST_WAIT_MS = 500;
const LONGEST_WAIT_MS = 5_000;
const OPEN_WITHIN_MS = 8_000;
const PING_EVERY_MS = 25_000;
const PONG_WITHIN_MS = 10_000;
/** So many handshakes in a row without one that ever worked: something blocks sockets. */
const BLOCKED_AFTER = 2;
/** Networks change; after this long sockets are tried once more. */
const BLOCKED_FOR_MS = 60_000;
const REFUSALS = new Set([4401, 4403, 4404]);
const LIMITED = 4429;

/** What this page has learnt about sockets; shared by all conversations. */
const learnt = { everOpened: false, failures: 0, blockedUntil: 0 };

export class ChatStream {
  /** @type {WebSocket | null} */ #socket = null;
  /** @type {LineState} */ #state = "closed";
  /** @type {object[]} sent as soon as the line opens */ #outbox = [];
  /** @type {AbortController | null} */ #request = null;
  #attempt = 0;
  #wanted = false;
  /** @type {number | undefined} */ #retryTimer;
  /** @type {number | undefined} */ #openTimer;
  /** @type {number | undefined} */ #pingTimer;
  /** @type {number | undefined} */ #pongTimer;
  #wake = () => this.#reconnectNow();

  /** @param {string} conversation @param {Listener} listener */
  constructor(conversation, listener) {
    this.conversation = conversation;
    this.listener = listener;
  }

  get state() {
    return this.#state;
  }

  /** Whether events come by fetch because sockets do not work here. */
  get bySse() {
    return Date.now() < learnt.blockedUntil;
  }

  open() {
    if (this.#wanted) return;
    this.#wanted = true;
    window.addEventListener("online", this.#wake);
    this.#connect();
  }

  /** For good, and without a word to the listener, who asked for it. */
  close() {
    this.#wanted = false;
    this.#state = "closed";
    window.removeEventListener("online", this.#wake);
    this.#request?.abort();
    this.#drop();
  }

  /** @param {string} text @param {string} ref comes back with the answer's first event or refusal; sent
   * again, the question is not asked twice */
  ask(text, ref) {
    if (this.bySse) void this.#askBySse(text, ref);
    else this.#send({ type: "message.create", text, ref, idempotency_key: ref });
  }

  /** Take back a question that has not left yet. @returns {boolean} whether there was one */
  unask() {
    const had = this.#outbox.length > 0;
    this.#outbox = [];
    return had;
  }

  /** @param {string} id @returns {boolean} false: not possible on this line, ask again instead */
  retry(id) {
    if (this.bySse) return false;
    this.#send({ type: "message.retry", id });
    return true;
  }

  /** Another answer (`text` null) or a question put differently; only HTTP knows these, the socket
   * does not. @param {string} id @param {string | null} text @param {string} ref */
  replace(id, text, ref) {
    void this.#read((signal) => postVersion(id, text, ref, signal), ref);
  }

  /** @param {string} id */
  async cancel(id) {
    if (this.#state === "open" && this.#socket) this.#transmit({ type: "message.cancel" });
    else await cancelMessage(id);
  }

  /** @param {string} id */
  async hurry(id) {
    if (this.#state === "open" && this.#socket) this.#transmit({ type: "message.hurry", id });
    else await hurryMessage(id);
  }

  /** @param {number} afterSeq @returns {boolean} false: not possible on this line, look again later */
  resume(afterSeq) {
    if (!this.#socket || this.#state !== "open") return false;
    this.#transmit({ type: "message.resume", after_seq: afterSeq });
    return true;
  }

  // --- the socket ---------------------------------------------------------------------------

  #connect() {
    this.#drop();
    if (this.bySse) {
      this.#become("open");
      this.#flush();
      return;
    }
    this.#become(this.#attempt ? "waiting" : "connecting");
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const path = `/ws/chat/${encodeURIComponent(this.conversation)}/`;
    let socket;
    try {
      socket = new WebSocket(`${scheme}://${location.host}${path}`);
    } catch {
      learnt.failures = BLOCKED_AFTER; // blocked by policy: no use in trying again
      this.#failed(0);
      return;
    }
    this.#socket = socket;
    this.#openTimer = window.setTimeout(() => this.#failed(0), OPEN_WITHIN_MS);
    socket.onopen = () => this.#opened();
    socket.onmessage = (event) => this.#received(event.data);
    socket.onclose = (event) => this.#failed(event.code);
  }

  #opened() {
    clearTimeout(this.#openTimer);
    learnt.everOpened = true;
    learnt.failures = 0;
    this.#attempt = 0;
    this.#pingTimer = window.setInterval(() => this.#ping(), PING_EVERY_MS);
    this.#become("open");
    this.#flush();
  }

  /** @param {number} code of the close, 0 if there never was a connection */
  #failed(code) {
    this.#drop();
    if (!this.#wanted) return;
    if (REFUSALS.has(code)) {
      this.#wanted = false;
      this.#become("closed");
      this.listener.onRefused(code);
      return;
    }
    learnt.failures += 1;
    if (!learnt.everOpened && learnt.failures >= BLOCKED_AFTER && navigator.onLine) {
      learnt.blockedUntil = Date.now() + BLOCKED_FOR_MS;
      learnt.failures = 0;
      this.#connect();
      return;
    }
    this.#become("waiting");
    const wait = code === LIMITED ? LONGEST_WAIT_MS : waitMs(this.#attempt);
    this.#attempt += 1;
    this.#retryTimer = window.setTimeout(() => this.#connect(), wait);
  }

  #reconnectNow() {
    if (this.#wanted && this.#state === "waiting") this.#connect();
  }

  /** Forget the socket and everything that waits on it. */
  #drop() {
    clearTimeout(this.#retryTimer);
    clearTimeout(this.#openTimer);
    clearTimeout(this.#pongTimer);
    this.#pongTimer = undefined;
    clearInterval(this.#pingTimer);
    const socket = this.#socket;
    this.#socket = null;
    if (!socket) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }

  #ping() {
    this.#transmit({ type: "ping" });
    this.#pongTimer ??= window.setTimeout(() => this.#failed(0), PONG_WITHIN_MS);
  }

  /** @param {string} data */
  #received(data) {
    clearTimeout(this.#pongTimer);
    this.#pongTimer = undefined;
    const frame = parse(data);
    if (frame) this.listener.onFrame(frame);
  }

  /** @param {object} frame */
  #send(frame) {
    this.#outbox.push(frame);
    if (this.#state === "open") this.#flush();
  }

  #flush() {
    const frames = this.#outbox;
    this.#outbox = [];
    for (const frame of frames) this.#dispatch(/** @type {any} */ (frame));
  }

  /** A frame that waited for a socket may find that there will be none. @param {Frame} frame */
  #dispatch(frame) {
    if (this.#socket) this.#transmit(frame);
    else if (frame.type === "message.create") void this.#askBySse(frame.text ?? "", frame.ref ?? "");
    else this.listener.onLost();
  }

  /** @param {object} frame */
  #transmit(frame) {
    this.#socket?.send(JSON.stringify(frame));
  }

  /** @param {LineState} state */
  #become(state) {
    if (state === this.#state) return;
    this.#state = state;
    this.listener.onState(state);
  }

  // --- server-sent events -------------------------------------------------------------------

  /** @param {string} text @param {string} ref */
  #askBySse(text, ref) {
    return this.#read((signal) => postQuestion(this.conversation, text, ref, signal), ref);
  }

  /** @param {(signal: AbortSignal) => Promise<Response>} post @param {string} ref */
  async #read(post, ref) {
    this.#request = new AbortController();
    const signal = this.#request.signal;
    let ended = false;
    try {
      const response = await post(signal);
      for await (const frame of eventsOf(response)) {
        ended ||= frame.type === "message.completed" || frame.type === "message.failed";
        this.listener.onFrame({ ref, ...frame });
      }
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError) {
        this.listener.onFrame({ type: "error", ref, error: asWire(error) });
        return;
      }
    }
    if (!ended) this.listener.onLost();
  }
}

/** Half to all of 1, 2, 4, 5, 5 … seconds: clients that lost the same server do not come in step.
 * @param {number} attempt */
function waitMs(attempt) {
  const longest = Math.min(LONGEST_WAIT_MS, 2 * FIRST_WAIT_MS * 2 ** attempt);
  return longest * (0.5 + Math.random() / 2);
}

/** @param {string} data @returns {Frame | null} */
function parse(data) {
  try {
    const frame = JSON.parse(data);
    return frame && typeof frame.type === "string" ? frame : null;
  } catch {
    return null;
  }
}

/** @param {ApiError} error @returns {WireError} */
function asWire(error) {
  return { code: error.code, message: error.message, retry_after_s: error.retryAfterS };
}

/** The frames of an event stream; comments and unknown fields are skipped.
 * @param {Response} response @returns {AsyncGenerator<Frame>} */
async function* eventsOf(response) {
  if (!response.body) return;
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const blocks = buffer.split(/\r?\n\r?\n/);
    buffer = blocks.pop() ?? "";
    for (const block of blocks) {
      const frame = frameOf(block);
      if (frame) yield frame;
    }
  }
}

/** @param {string} block @returns {Frame | null} */
function frameOf(block) {
  const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.length ? parse(lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n")) : null;
}
