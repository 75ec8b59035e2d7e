// @ts-check
/* The look that needs a hand: following the text as it grows, tooltips that would be cut off, the
   chosen theme. Knows nothing of conversations. */

const AT_BOTTOM_PX = 48;
const TIP_GAP_PX = 12;

/** @param {string} id @returns {any} */
const byId = (id) => document.getElementById(id);

/** Keeps the end of the log in view for whoever is there, and leaves alone who scrolled up. */
export class Follower {
  #atBottom = true;
  #lastTop = 0;
  #scroller = /** @type {HTMLElement} */ (byId("scroller"));

  constructor() {
    const grown = new ResizeObserver(() => {
      if (this.#atBottom) this.#toBottom();
      this.#showJump();
    });
    grown.observe(byId("log"));
    grown.observe(this.#scroller);
    this.#scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    byId("log").addEventListener("pointerover", (/** @type {Event} */ event) => this.#placeTip(event));
    byId("log").addEventListener("focusin", (/** @type {Event} */ event) => this.#placeTip(event));
  }

  /** Go to the end and stay there. */
  follow() {
    this.#atBottom = true;
    this.#toBottom();
    this.#showJump();
  }

  /** Only a reader scrolls up: text that grew since the last event must not count as leaving. */
  #scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    if (scrollHeight - scrollTop - clientHeight < AT_BOTTOM_PX) this.#atBottom = true;
    else if (scrollTop < this.#lastTop) this.#atBottom = false;
    this.#lastTop = scrollTop;
    this.#showJump();
  }

  /** Somewhere else is to be read. */
  leave() {
    this.#atBottom = false;
  }

  #toBottom() {
    this.#scroller.scrollTop = this.#scroller.scrollHeight;
  }

  #showJump() {
    byId("jump").hidden = this.#atBottom;
  }

  /** A tooltip that would be cut off above opens below. @param {Event} event */
  #placeTip(event) {
    const origin = /** @type {Element} */ (event.target).closest(".origin");
    if (!origin) return;
    const room = origin.getBoundingClientRect().top - this.#scroller.getBoundingClientRect().top;
    origin.classList.toggle("below", room < (origin.querySelector(".tip")?.clientHeight ?? 0) + TIP_GAP_PX);
  }
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function toggleTheme() {
  const theme = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = theme;
  showTheme();
  try {
    localStorage.setItem("theme", theme);
  } catch {
    /* not kept, but changed */
  }
}

export function showTheme() {
  const words = isDark() ? "Switch to the light theme" : "Switch to the dark theme";
  byId("theme").title = words;
  byId("theme").setAttribute("aria-label", words);
}
