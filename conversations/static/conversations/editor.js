// @ts-check
/* A question opened for editing, in its place: Enter sends, Escape leaves it as it was. Knows the
   form; who stores the new version, and whether the server takes it, is told to it. */

/** @typedef {import("./api.js").Message} Message */

export class Editor {
  /** @type {HTMLFormElement | null} */ #form = null;
  #template = /** @type {HTMLTemplateElement} */ (document.getElementById("t-editor"));

  /** @param {number} maxChars @param {(message: Message, text: string) => void} send */
  constructor(maxChars, send) {
    this.maxChars = maxChars;
    this.send = send;
  }

  /** @param {HTMLElement} element of the message @param {Message} message
   * @param {boolean} last whether nothing was said after its answer */
  open(element, message, last) {
    this.close();
    const copy = /** @type {DocumentFragment} */ (this.#template.content.cloneNode(true));
    const form = /** @type {HTMLFormElement} */ (copy.firstElementChild);
    this.#form = form;
    element.classList.add("editing");
    element.querySelector(".column")?.append(form);
    /** @type {HTMLElement} */ (form.querySelector(".editor-note")).hidden = last;
    const field = this.#field(form);
    field.maxLength = this.maxChars;
    field.value = message.text;
    field.addEventListener("keydown", (event) => this.#onKey(event, form));
    form.addEventListener("submit", (event) => this.#submit(event, message));
    form.querySelector(".editor-cancel")?.addEventListener("click", () => this.close());
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }

  /** Leave the question as it was, and the focus at its button. */
  close() {
    const form = this.#form;
    this.#form = null;
    if (!form?.isConnected) return;
    const element = form.closest(".message");
    form.remove();
    element?.classList.remove("editing");
    /** @type {HTMLElement | null | undefined} */ (element?.querySelector(".edit"))?.focus();
  }

  /** The new version was refused: what was typed is still there, to be sent again. */
  release() {
    if (this.#form?.isConnected) this.#allow(this.#form, true);
  }

  /** @param {Event} event @param {Message} message */
  #submit(event, message) {
    event.preventDefault();
    const form = this.#form;
    const text = form && this.#field(form).value.trim();
    if (!form || !text) return;
    this.#allow(form, false);
    this.send(message, text);
  }

  /** @param {KeyboardEvent} event @param {HTMLFormElement} form */
  #onKey(event, form) {
    if (event.isComposing || event.keyCode === 229) return; // as in the composer
    if (event.key === "Escape") this.close();
    else if (event.key === "Enter" && !event.shiftKey) form.requestSubmit();
    else return;
    event.preventDefault();
  }

  /** @param {HTMLFormElement} form @param {boolean} allowed */
  #allow(form, allowed) {
    this.#field(form).readOnly = !allowed;
    for (const button of form.querySelectorAll("button")) button.disabled = !allowed;
  }

  /** @param {HTMLFormElement} form */
  #field(form) {
    return /** @type {HTMLTextAreaElement} */ (form.querySelector("textarea"));
  }
}
