/* The chosen theme, put on the page before it is painted. Knows nothing else; without a choice the
   system decides (see color-scheme in chat.css). Storage may be forbidden, which is no error. */
(() => {
  try {
    const chosen = localStorage.getItem("theme");
    if (chosen === "dark" || chosen === "light") document.documentElement.dataset.theme = chosen;
  } catch {
    /* private mode: the system's theme it is */
  }
})();
