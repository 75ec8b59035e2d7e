// @ts-check
/* What was typed and not sent, by conversation, for as long as this tab lives. Storage may be
   forbidden; then the field itself is all there is, and that is no error. */

/** @param {string} key @param {string} text */
export function keepDraft(key, text) {
  try {
    if (text) sessionStorage.setItem(`draft:${key}`, text);
    else sessionStorage.removeItem(`draft:${key}`);
  } catch {
    /* forbidden */
  }
}

/** @param {string} key */
export function draftOf(key) {
  try {
    return sessionStorage.getItem(`draft:${key}`) ?? "";
  } catch {
    return "";
  }
}

/** Who signs out leaves nothing behind for the next person at this screen. */
export function dropDrafts() {
  try {
    sessionStorage.clear();
  } catch {
    /* then nothing was kept */
  }
}
