/** The conversation on the page: what is said, how it is answered, and the streams that are open. One message's looks are message.js's. */
import { $, announce, h } from "./dom.js";
import { MessageView } from "./message.js";
import { toBody } from "./settings.js";
import { compact } from "./tokens.js";

const EXAMPLES = ["Hello! What are you?", "What is 17 + 25?", "Write a short story about a fox."];

export class Chat {
  /** `on.changed()` after a conversation's list entry changed, `on.unauthorized(retry)` at a 401, `on.refused(param)` at a refused field. */
  constructor(api, store, on) {
    this.api = api;
    this.store = store;
    this.on = on;
    this.streams = new Map(); // conversation -> AbortController
    this.log = $("log");
  }

  /** Shows a conversation. */
  show(chat) {
    this.chat = chat;
    this.views = new Map();
    this.log.replaceChildren();
    for (const message of chat.messages) this.#add(message);
    if (!chat.messages.length) this.#welcome();
    this.#toEnd();
    this.#mode();
  }

  send(text) {
    if (this.streams.has(this.chat)) return false;
    const { messages } = this.chat;
    if (messages.at(-1)?.error && !messages.at(-1).content) this.#drop(messages.length - 1);
    this.#push(this.chat, { role: "user", content: text });
    this.answer(this.chat);
    return true;
  }

  stop() {
    this.streams.get(this.chat)?.abort();
  }

  /** Opens the last message of the reader's own for editing. */
  editLast() {
    const own = this.chat.messages.findLast((message) => message.role === "user");
    if (own && !this.streams.has(this.chat)) this.views.get(own).edit();
  }

  // --------------------------------------------------------------------------------------------------------- an answer

  async answer(chat) {
    const message = { role: "assistant", content: "", model: chat.model };
    const control = new AbortController();
    this.streams.set(chat, control);
    this.#push(chat, message);
    this.#mode();
    announce("Answering");
    const clock = { start: performance.now() };
    try {
      const decoder = new TextDecoder();
      for await (const chunk of this.api.chat(this.#request(chat), control.signal)) {
        take(message, chunk, clock, decoder);
        this.#soon(chat, message);
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else this.#failed(chat, message, error);
    }
    finish(message, clock);
    this.streams.delete(chat);
    this.#save(chat);
    if (chat === this.chat) {
      this.#follow(() => this.#refresh());
      this.#mode();
      announce(message.error ?? (message.stopped ? "Stopped" : "Answer complete"));
    }
  }

  #request(chat) {
    const messages = chat.settings.system ? [{ role: "system", content: chat.settings.system }] : [];
    for (const { role, content, reasoning, tool_calls, tool_call_id } of chat.messages.slice(0, -1)) {
      if (role === "assistant" && !content && !tool_calls) continue; // failed, or stopped before its first word
      messages.push({ role, content, reasoning_content: reasoning, tool_calls, tool_call_id });
    }
    return { model: chat.model, messages, ...toBody(chat.settings), stream: true, stream_options: { include_usage: true } };
  }

  #failed(chat, message, error) {
    message.error = error.status ? `${error.message} (${error.status})` : error.message;
    if (error.param && chat === this.chat) this.on.refused(error.param);
    if (error.status === 401) this.on.unauthorized(() => this.#again(chat, message));
  }

  /** A new answer in place of `message` and of all that came after it. */
  #again(chat, message) {
    const index = chat.messages.indexOf(message);
    if (index < 0 || this.streams.has(chat)) return;
    this.#cut(chat, index);
    this.answer(chat);
  }

  // ----------------------------------------------------------------------------------------------------------- changes

  #push(chat, message) {
    chat.messages.push(message);
    if (!chat.title && message.role === "user") chat.title = message.content.trim().split("\n")[0].slice(0, 60);
    chat.updated = Date.now();
    if (chat === this.chat) {
      if (chat.messages.length === 1) this.log.replaceChildren();
      this.#add(message);
      this.#refresh();
      this.#toEnd();
    }
    this.#save(chat);
  }

  #cut(chat, index) {
    const gone = chat.messages.splice(index);
    if (chat === this.chat) gone.forEach((message) => this.#forget(message));
  }

  #drop(index) {
    this.chat.messages.splice(index, 1).forEach((message) => this.#forget(message));
  }

  #forget(message) {
    this.views.get(message)?.element.remove();
    this.views.delete(message);
  }

  #edit(chat, message, text) {
    message.content = text;
    if (message.role === "assistant") {
      delete message.tokens; // they are another text's
      this.#refresh();
      this.#save(chat);
    } else {
      this.#cut(chat, chat.messages.indexOf(message) + 1);
      this.views.get(message)?.update(false);
      this.answer(chat);
    }
  }

  #result(chat, call, text) {
    if (this.streams.has(chat)) return;
    this.#push(chat, { role: "tool", tool_call_id: call.id, content: text });
    const called = chat.messages.findLast((message) => message.tool_calls);
    const open = called.tool_calls.filter((other) => !chat.messages.some((message) => message.tool_call_id === other.id));
    if (!open.length) this.answer(chat);
  }

  #save(chat) {
    if (this.store.chats.includes(chat) && !this.store.save(chat)) {
      $("notice").textContent = "The browser's storage is full: this conversation is not kept. Delete some others.";
    }
    this.on.changed();
  }

  // ----------------------------------------------------------------------------------------------------------- showing

  #add(message) {
    const view = new MessageView(message, this.#actions(this.chat, message));
    this.views.set(message, view);
    this.log.append(view.element);
  }

  #actions(chat, message) {
    const idle = !this.streams.has(chat);
    const answered = (call) => chat.messages.some((other) => other.tool_call_id === call.id);
    const waits = idle && message.tool_calls?.some((call) => !answered(call));
    return {
      edit: idle && !message.error && ((text) => this.#edit(chat, message, text)),
      regenerate: idle && message.role === "assistant" && message === chat.messages.at(-1) && (() => this.#again(chat, message)),
      result: waits && ((call, text) => this.#result(chat, call, text)),
    };
  }

  /** What may be done changes with every message, and with the beginning and the end of an answer. */
  #refresh() {
    for (const [message, view] of this.views) {
      const actions = this.#actions(this.chat, message);
      if (Boolean(actions.result) !== Boolean(view.actions.result)) view.calls.source = null;
      view.actions = actions;
      view.update(this.streams.has(this.chat) && message === this.chat.messages.at(-1));
    }
  }

  /** Shows a growing message with the next frame. */
  #soon(chat, message) {
    if (this.frame || chat !== this.chat) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      const view = this.views.get(message);
      if (view && this.streams.has(chat)) this.#follow(() => view.update(true));
    });
  }

  /** Stays at the end over a change if the reader is there. */
  #follow(change) {
    const { scrollHeight, scrollTop, clientHeight } = this.log;
    change();
    if (scrollHeight - scrollTop - clientHeight < 80) this.#toEnd();
  }

  #toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  #mode() {
    const busy = this.streams.has(this.chat);
    $("send").hidden = busy;
    $("stop").hidden = !busy;
  }

  #welcome() {
    const { model } = this.chat;
    this.log.append(h("div", { class: "welcome" }, h("h2", {}, model || "No model yet"),
      h("p", { class: "faint" }, this.about?.(model) ?? ""),
      h("div", { class: "examples" }, EXAMPLES.map((text) => h("button", { type: "button", onclick: () => this.send(text) }, text)))));
  }
}

/** Adds a stream's chunk to the message. */
function take(message, chunk, clock, decoder) {
  if (chunk.usage) clock.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { delta = {}, logprobs, finish_reason } = choice;
  const thought = delta.reasoning_content ?? delta.reasoning;
  if (delta.content || thought || delta.tool_calls) {
    clock.last = performance.now();
    clock.first ??= clock.last;
  }
  if (delta.content) message.content += delta.content;
  if (thought) message.reasoning = (message.reasoning ?? "") + thought;
  for (const part of delta.tool_calls ?? []) {
    const calls = (message.tool_calls ??= []);
    const call = (calls[part.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
    call.id ||= part.id ?? "";
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
  }
  if (logprobs?.content) (message.tokens ??= []).push(...logprobs.content.map((entry) => compact(entry, decoder)));
  if (finish_reason) clock.finish = finish_reason;
}

function finish(message, { start, first, last, usage, finish }) {
  if (first === undefined) return;
  const tokens = usage?.completion_tokens;
  const stats = { tokens, first: first - start, finish, prompt: usage?.prompt_tokens, cached: usage?.prompt_tokens_details?.cached_tokens };
  if (tokens > 1 && last > first) stats.rate = (1000 * (tokens - 1)) / (last - first);
  message.stats = stats;
}
