/** One message on the page. Shows it, follows it while it is written, lets it be edited; what follows from that is chat.js's. */
import { copyButton, growing, h } from "./dom.js";
import { render } from "./markdown.js";
import { TokenView } from "./tokens.js";

const NAMES = { user: "You", tool: "Tool result", system: "System" };

export class MessageView {
  /** `actions` are what the reader may do: edit(text), regenerate(), retry(), result(call, text); a missing one is not offered. */
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    const name = NAMES[message.role] ?? message.model ?? "Assistant";
    this.reasoning = h("div", { class: "thought" });
    this.body = h("div", { class: "body" });
    this.calls = h("div", { class: "calls" });
    this.foot = h("footer");
    this.element = h("article", { class: `message ${message.role}`, "aria-label": name }, h("div", { class: "who", "aria-hidden": "true" }, name),
      h("details", { class: "reasoning" }, h("summary", {}, "Reasoning"), this.reasoning), this.body, this.calls, this.foot);
    this.update(false);
  }

  /** Shows the message as it is now; `writing` while more is to come. */
  update(writing) {
    const { message } = this;
    const { thought, text, open } = split(message);
    this.element.classList.toggle("writing", writing);
    this.element.setAttribute("aria-busy", writing);
    this.reasoning.parentElement.hidden = !thought;
    this.reasoning.parentElement.firstChild.textContent = writing && open ? "Reasoning …" : "Reasoning";
    if (this.reasoning.textContent !== thought) this.reasoning.textContent = thought;
    if (message.tokens?.length && !message.plain) this.#showTokens();
    else if (message.role === "assistant") this.#clearTokens(), render(this.body, text);
    else this.body.textContent = text;
    this.#showCalls(writing);
    if (!writing) this.foot.replaceChildren(...this.#ending());
    else if (this.foot.children.length) this.foot.replaceChildren();
  }

  #showTokens() {
    if (!this.tokens) {
      this.tokens = new TokenView(this.message.tokens);
      this.body.replaceChildren(this.tokens.element);
    }
    this.tokens.append();
  }

  #clearTokens() {
    if (this.tokens) this.body.replaceChildren();
    this.tokens = null;
  }

  // -------------------------------------------------------------------------------------------------------- tool calls

  #showCalls(writing) {
    const calls = this.message.tool_calls ?? [];
    const source = JSON.stringify([calls, writing]);
    if (this.calls.source === source) return;
    this.calls.source = source;
    this.calls.replaceChildren(...calls.map((call) => h("figure", { class: "code call" },
      h("figcaption", {}, h("span", {}, "calls ", h("b", {}, call.function.name)), copyButton(() => call.function.arguments)),
      h("pre", { tabindex: 0 }, h("code", {}, pretty(call.function.arguments))), !writing && this.actions.result && this.#resultForm(call))));
  }

  #resultForm(call) {
    const area = h("textarea", { rows: 1, "aria-label": `Result of ${call.function.name}`, placeholder: "Result, sent back to the model" });
    growing(area);
    const send = () => this.actions.result(call, area.value);
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) event.preventDefault(), send();
    });
    return h("div", { class: "result" }, area, h("button", { type: "button", onclick: send }, "Send result"));
  }

  // ------------------------------------------------------------------------------------------------------ what is below

  #ending() {
    const { message, actions } = this;
    const button = (label, act) => h("button", { type: "button", class: "quiet", onclick: act }, label);
    return [
      message.error && h("div", { class: "error", role: "alert" }, h("span", {}, message.error),
        actions.regenerate && h("button", { type: "button", onclick: actions.regenerate }, "Try again")),
      h("div", { class: "below" },
        h("span", { class: "stats" }, figures(message)),
        h("span", { class: "actions" },
          message.tokens?.length > 0 && button(message.plain ? "Tokens" : "Text", () => this.#toggle()),
          message.content && copyButton(() => split(message).text),
          actions.edit && button("Edit", () => this.edit()),
          !message.error && actions.regenerate && button("Regenerate", actions.regenerate))),
    ].filter(Boolean);
  }

  #toggle() {
    this.message.plain = !this.message.plain;
    this.update(false);
  }

  /** A box with the text in place of the message. */
  edit() {
    const area = h("textarea", { "aria-label": "Message", rows: 2 });
    area.value = this.message.content ?? "";
    const close = () => {
      this.tokens = null;
      this.body.replaceChildren();
      this.update(false);
    };
    const save = () => {
      close();
      this.actions.edit(area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") event.stopPropagation(), close();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    const word = this.message.role === "assistant" ? "Save" : "Send";
    this.body.replaceChildren(area, h("div", { class: "editing" }, h("button", { type: "button", class: "primary", onclick: save }, word),
      h("button", { type: "button", onclick: close }, "Cancel")));
    this.foot.replaceChildren();
    growing(area);
    area.focus();
  }
}

/** Reasoning apart from the answer: the server's own field, or a leading <think> that it left in the text. */
function split(message) {
  const content = message.content ?? "";
  const found = /^\s*<think>([\s\S]*?)(<\/think>\s*|$)/.exec(message.role === "assistant" ? content : "");
  const thought = (message.reasoning ?? "") + (found?.[1] ?? "");
  const text = found ? content.slice(found[0].length) : content;
  return { thought: thought.trim(), text, open: !text };
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still being written, or not JSON
  }
}

function figures({ stats, stopped }) {
  if (!stats) return stopped ? "stopped" : "";
  const { prompt, cached, tokens, first, rate, finish } = stats;
  return [
    stopped && "stopped",
    finish === "length" && "cut off at the token limit",
    tokens != null && `${tokens} ${tokens === 1 ? "token" : "tokens"}`,
    rate && `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tok/s`,
    first != null && `first after ${first < 1000 ? `${Math.round(first)} ms` : `${(first / 1000).toFixed(2)} s`}`,
    prompt != null && `prompt ${prompt}${cached ? `, ${cached} cached` : ""}`,
  ].filter(Boolean).join(" · ");
}
