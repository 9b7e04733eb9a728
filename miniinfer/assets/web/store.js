/** Conversations in the browser's own storage, one entry each. Owns their shape. */

const PREFIX = "miniinfer.chat.";

/**
 * A conversation is {id, title, model, settings, updated, messages}. A message is {role, content} and, if an answer, what came with it:
 * reasoning, tool_calls, stats, error; `tokens` (probabilities) are too large to keep and go with the page.
 */
export class Store {
  constructor() {
    this.chats = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map(read).filter(Boolean)
      .sort((a, b) => b.updated - a.updated);
  }

  create(settings, model) {
    const id = `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`;
    const chat = { id, title: "", model, settings: { ...settings }, updated: Date.now(), messages: [] };
    this.chats.unshift(chat);
    return chat;
  }

  /** False if the storage is full. */
  save(chat) {
    const kept = { ...chat, messages: chat.messages.map(({ tokens, ...message }) => message) };
    try {
      localStorage.setItem(PREFIX + chat.id, JSON.stringify(kept));
      return true;
    } catch {
      return false;
    }
  }

  remove(chat) {
    localStorage.removeItem(PREFIX + chat.id);
    this.chats = this.chats.filter((other) => other !== chat);
  }
}

function read(key) {
  try {
    const chat = JSON.parse(localStorage.getItem(key));
    return Array.isArray(chat.messages) ? chat : null;
  } catch {
    return null; // not ours, or damaged
  }
}

/** A small setting of the page itself. */
export function preference(name, value) {
  const key = `miniinfer.${name}`;
  if (value !== undefined) localStorage.setItem(key, JSON.stringify(value));
  return JSON.parse(localStorage.getItem(key) ?? "null");
}
