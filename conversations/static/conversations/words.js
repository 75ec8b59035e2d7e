// @ts-check
/* How the page puts things: where an answer came from, what went wrong, when it was. Pure: values
   in, words out; no page, no network. */

/** @typedef {import("./api.js").Message} Message */
/** @typedef {import("./api.js").WireError} WireError */

/** @type {Record<string, string>} */
const ROUTES = {
  model: "Assistant's model",
  reviewed: "Reviewed answer",
  cache: "Saved answer",
  upstream: "Cloud model",
  rules: "Rule",
  human: "The way to a person",
};
/** @type {Record<string, string>} */
const ROUTE_TIPS = {
  model: "Written by the small language model that runs on this site's own servers.",
  reviewed: "Written or approved by a member of staff.",
  cache: "The same question was answered before; this is that answer.",
  upstream: "Written by a larger model at a cloud service.",
  rules: "A fixed text that staff prepared for questions like this one.",
  human: "The assistant could not answer this itself and shows the way to a person.",
};
/** Reason: the few words in the caption, and the sentence behind it. @type {Record<string, [string, string]>} */
const REASONS = {
  low_confidence: ["model unsure", "The model was not sure enough of its own answer."],
  caution: ["please check", "The model was fairly sure, but not quite; please check what it says."],
  out_of_scope: ["outside its topics", "The question seems to be about something this assistant was not made for."],
  overload: ["model busy", "Too many people were asking at once, so the model was not waited for."],
  timeout: ["model too slow", "The model took too long to begin."],
  hurry: ["not waited for", "You chose an answer at once instead of waiting for the model."],
  breaker_open: ["model resting", "The model failed several times and is given a pause."],
  error: ["model had a problem", "The model could not answer because of a technical problem."],
  budget: ["budget used up", "The budget for the cloud model is used up for now."],
};
/** Where the server's own wording would not help a visitor. @type {Record<string, string>} */
const ERRORS = {
  generation_failed: "The answer broke off because of a technical problem.",
  interrupted: "The answer was interrupted.",
  overloaded: "Too many people are asking at the moment.",
  model_unavailable: "The assistant's model is unavailable at the moment.",
  context_too_long: "The question is too long for the assistant. Please shorten it.",
  conflict: "An answer is still being written in this conversation. Wait for it, or stop it.",
  rate_limited: "That was a lot of questions in a short time.",
  unauthenticated: "You are signed out. Please sign in to go on.",
  internal: "Something broke on our side.",
  unreachable: "The server cannot be reached.",
};

/**
 * The caption of a finished answer and the sentences of its tooltip.
 * @param {Message} message @returns {{label: string, tip: string}}
 */
export function origin(message) {
  const [short, reason] = REASONS[message.degraded_reason] ?? [message.degraded_reason, ""];
  if (message.author) return { label: `A person: ${message.author}`, tip: "Written by a member of staff, for you." };
  const parts = [ROUTES[message.route] ?? message.route];
  const tips = [ROUTE_TIPS[message.route] ?? "", reason];
  if (short) parts.push(short);
  else if (message.route === "model" && message.confidence !== null) {
    parts.push(`${percent(message.confidence)} sure`);
  }
  if (message.route === "model" && message.confidence !== null) {
    tips.push(`It puts the chance that it understood the question at ${percent(message.confidence)}.`);
  }
  if (message.ttft_ms !== null && message.ttft_ms !== undefined && message.route) {
    tips.push(`First word after ${duration(message.ttft_ms)}.`);
  }
  if (message.status === "stopped") parts.push("stopped");
  return { label: parts.filter(Boolean).join(" · "), tip: tips.filter(Boolean).join(" ") };
}

/** Where a question stands that waits. @param {{position: number, seconds: number | null}} place */
export function queueWords({ position, seconds }) {
  const where = `You are number ${position}`;
  return seconds === null ? `${where}.` : `${where}, about ${Math.max(1, seconds)} s.`;
}

/** Whether the wait is long enough to be offered an answer at once.
 * @param {{seconds: number | null}} place */
export function isLong({ seconds }) {
  return seconds !== null && seconds > 2;
}

/** How far the person is who was asked for; nothing once they answered. @param {Message} message */
export function personWords({ hand_over: asked }) {
  if (asked?.status === "waiting") return "A person from our team was asked. You can go on writing.";
  return asked?.status === "taken" ? `Being looked at by ${asked.by}.` : "";
}

/** @param {WireError | null | undefined} error */
export function errorWords(error) {
  if (!error) return "Something went wrong.";
  return ERRORS[error.code] || error.message || "Something went wrong.";
}

/** Never 100 %: nobody is that sure. @param {number} share 0..1 */
function percent(share) {
  return `${Math.min(99, Math.round(share * 100))} %`;
}

/** @param {number} ms */
function duration(ms) {
  return ms < 1000 ? `${Math.max(1, Math.round(ms))} ms` : `${(ms / 1000).toFixed(1)} s`;
}

const clock = new Intl.DateTimeFormat(undefined, { hour: "numeric", minute: "2-digit" });
const full = new Intl.DateTimeFormat(undefined, { dateStyle: "full", timeStyle: "short" });
const day = new Intl.DateTimeFormat(undefined, { weekday: "long", day: "numeric", month: "long" });

/** @param {string} iso */
export function timeOf(iso) {
  return clock.format(new Date(iso));
}

/** @param {string} iso */
export function fullTimeOf(iso) {
  return full.format(new Date(iso));
}

/** @param {string} iso */
export function dayOf(iso) {
  const days = daysAgo(iso);
  if (days <= 0) return "Today";
  return days === 1 ? "Yesterday" : day.format(new Date(iso));
}

/** The heading a conversation stands under in the list. @param {string} iso */
export function ageOf(iso) {
  const days = daysAgo(iso);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return days < 7 ? "Last 7 days" : "Older";
}

/** @param {string} iso */
function daysAgo(iso) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  return Math.round((midnight - new Date(iso).setHours(0, 0, 0, 0)) / 86_400_000);
}
