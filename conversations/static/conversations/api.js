// @ts-check
/* The REST API as functions, and its errors as one class. Knows addresses, the CSRF token and
   problem+json; knows nothing of the page. */

/** @typedef {{id: string, title: string, created_at: string, updated_at: string}} Conversation */
/** @typedef {{code: string, message: string, retry_after_s?: number | null}} WireError */
/**
 * @typedef {object} Message
 * @property {string} id
 * @property {string} conversation
 * @property {number} seq
 * @property {string | null} parent what it follows: an answer its question, a question the answer before
 * @property {string[]} siblings all versions of it, oldest first; empty if there is one
 * @property {boolean} shown false: a newer version stands in its place
 * @property {"user" | "assistant"} role
 * @property {string} text
 * @property {string} html
 * @property {"streaming" | "complete" | "stopped" | "interrupted" | "failed"} status
 * @property {string} route
 * @property {string} degraded_reason
 * @property {number | null} confidence
 * @property {number | null} ttft_ms
 * @property {WireError | null} error
 * @property {{value: "up" | "down"} | null} feedback
 * @property {string | null} [author] the person of the staff who wrote it
 * @property {{status: "waiting" | "taken" | "answered" | "closed", by: string} | null} [hand_over] how far
 *   the person is whom this answer asked for
 * @property {{label: string, text: string}[]} [buttons] what may be asked next, ready to press
 * @property {string} created_at
 * @property {{position: number, seconds: number | null, hurried?: boolean}} [waiting] its place in the
 *   queue, while it has one, and whether its reader will not wait
 */
/** @template T @typedef {{next: string | null, previous: string | null, results: T[]}} Page */

const ROOT = "/api/v1/";
/** Longer than any answer of the API but a stream's first byte. */
const TIMEOUT_MS = 20_000;
/** Far above what a conversation holds; stops a server that always names a next page. */
const MOST_PAGES = 50;
const HITS_A_PAGE = 20;

/** Anything that kept a request from being answered, in words a person can use. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, code?: string, retryAfterS?: number | null}} [more]
   */
  constructor(message, { status = 0, code = "unreachable", retryAfterS = null } = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.code = code;
    this.retryAfterS = retryAfterS;
  }
}

/** @param {string | null} [nextPage] @returns {Promise<Page<Conversation>>} */
export function listConversations(nextPage) {
  return json("GET", nextPage ? samePath(nextPage) : "conversations/");
}

/** @returns {Promise<Conversation>} */
export function createConversation() {
  return json("POST", "conversations/", {});
}

/** @param {string} id @returns {Promise<Conversation>} */
export function getConversation(id) {
  return json("GET", `conversations/${encodeURIComponent(id)}/`);
}

/** @param {string} id @param {string} title @returns {Promise<Conversation>} */
export function renameConversation(id, title) {
  return json("PATCH", `conversations/${encodeURIComponent(id)}/`, { title });
}

/** @param {string} id */
export async function deleteConversation(id) {
  await request("DELETE", `conversations/${encodeURIComponent(id)}/`);
}

/** Every message that is shown, oldest first; with `versions` those that were replaced too.
 * @param {string} id @param {{versions?: boolean}} [how] @returns {Promise<Message[]>} */
export async function listMessages(id, { versions = false } = {}) {
  /** @type {Message[]} */
  const all = [];
  /** @type {string | null} */
  let path = `conversations/${encodeURIComponent(id)}/messages/${versions ? "?siblings=1" : ""}`;
  for (let pages = 0; path && pages < MOST_PAGES; pages += 1) {
    /** @type {Page<Message>} */
    const page = await json("GET", path);
    all.push(...page.results);
    path = page.next && samePath(page.next);
  }
  return all.sort((a, b) => a.seq - b.seq);
}

/** @param {string} id of the message that is being written */
export async function cancelMessage(id) {
  await request("POST", `messages/${encodeURIComponent(id)}/cancel/`, {});
}

/** Have what is known answer instead of waiting on. @param {string} id */
export async function hurryMessage(id) {
  await request("POST", `messages/${encodeURIComponent(id)}/hurry/`, {});
}

/** What the reader thinks of an answer; null takes it back.
 * @param {string} id @param {"up" | "down" | null} value */
export async function giveFeedback(id, value) {
  const path = `messages/${encodeURIComponent(id)}/feedback/`;
  await (value ? request("POST", path, { value }) : request("DELETE", path));
}

/**
 * The event stream of a new question.
 * @param {string} conversation @param {string} text @param {string} key sent again, it is not asked twice
 * @param {AbortSignal} signal @returns {Promise<Response>}
 */
export function postQuestion(conversation, text, key, signal) {
  const path = `conversations/${encodeURIComponent(conversation)}/messages/`;
  return request("POST", path, { text, stream: true }, { signal, key, accept: "text/event-stream" });
}

/**
 * The event stream of another answer, or of the question put differently.
 * @param {string} id of the answer, or of the question @param {string | null} text null: another answer
 * @param {string} key as of a question @param {AbortSignal} signal @returns {Promise<Response>}
 */
export function postVersion(id, text, key, signal) {
  const path = `messages/${encodeURIComponent(id)}/${text === null ? "regenerate" : "edit"}/`;
  const body = text === null ? { stream: true } : { text, stream: true };
  return request("POST", path, body, { signal, key, accept: "text/event-stream" });
}

/** One's own messages with these words, newest first.
 * @param {string} words @param {AbortSignal} signal @param {string | null} [nextPage]
 * @returns {Promise<Page<Message>>} */
export async function searchMessages(words, signal, nextPage) {
  const query = new URLSearchParams({ search: words, page_size: String(HITS_A_PAGE) });
  const path = nextPage ? samePath(nextPage) : `messages/?${query}`;
  return (await request("GET", path, undefined, { signal })).json();
}

/** One's own conversations with these words in the title or a message.
 * @param {string} words @param {AbortSignal} signal @returns {Promise<Page<Conversation>>} */
export async function searchConversations(words, signal) {
  const query = new URLSearchParams({ search: words });
  return (await request("GET", `conversations/?${query}`, undefined, { signal })).json();
}

/** Where a conversation can be downloaded. @param {string} id @param {"md" | "json"} format */
export function exportPath(id, format) {
  return `${ROOT}conversations/${encodeURIComponent(id)}/export/?format=${format}`;
}

/** @param {string} method @param {string} path @param {object} [body] @returns {Promise<any>} */
async function json(method, path, body) {
  return (await request(method, path, body)).json();
}

/**
 * @param {string} method @param {string} path @param {object} [body]
 * @param {{signal?: AbortSignal, accept?: string, key?: string}} [how]
 * @returns {Promise<Response>}
 */
async function request(method, path, body, how = {}) {
  /** @type {Record<string, string>} */
  const headers = { Accept: how.accept ?? "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (method !== "GET") headers["X-CSRFToken"] = csrfToken();
  if (how.key) headers["Idempotency-Key"] = how.key;
  let response;
  try {
    response = await fetch(path.startsWith("/") ? path : ROOT + path, {
      method,
      headers,
      body: body && JSON.stringify(body),
      credentials: "same-origin",
      signal: how.signal ?? AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch (error) {
    if (how.signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached.");
  }
  if (!response.ok) throw await problem(response);
  return response;
}

/** The error a problem+json body describes. @param {Response} response @returns {Promise<ApiError>} */
async function problem(response) {
  /** @type {any} */
  let body = {};
  try {
    body = await response.json();
  } catch {
    /* a proxy's own page */
  }
  const after = Number(response.headers.get("Retry-After"));
  return new ApiError(body.error?.message || body.detail || `The server answered ${response.status}.`, {
    status: response.status,
    code: body.error?.code || "http",
    retryAfterS: after > 0 ? after : null,
  });
}

/** The cookie is newer than the page if someone signed in beside it; the page's copy is the spare. */
function csrfToken() {
  const cookie = /(?:^|;\s*)csrftoken=([^;]+)/.exec(document.cookie);
  if (cookie) return decodeURIComponent(cookie[1]);
  return document.querySelector('meta[name="csrf-token"]')?.getAttribute("content") ?? "";
}

/** Path and query only: behind a proxy the server may not know its own scheme and host. @param {string} url */
function samePath(url) {
  const parsed = new URL(url, location.href);
  return parsed.pathname + parsed.search;
}
