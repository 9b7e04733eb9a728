/** The server seen from the page: requests with the API key, errors with the server's own words, and the events of a stream. No DOM. */

const KEY = "miniinfer.key";

export class ApiError extends Error {
  /** `param` is the field of the request at fault, where the server names one; status 0 is no answer at all. */
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export class Api {
  /** The key lives as long as the browser's tab. */
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  }

  set key(value) {
    sessionStorage.setItem(KEY, value);
  }

  async models() {
    return (await (await this.#fetch("v1/models")).json()).data;
  }

  async metrics() {
    return (await this.#fetch("metrics")).text();
  }

  /** The chunks of a streamed chat completion. */
  async *chat(body, signal) {
    const headers = { "content-type": "application/json" };
    const response = await this.#fetch("v1/chat/completions", { method: "POST", body: JSON.stringify(body), headers, signal });
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code | 0, chunk.error.message, chunk.error.param);
      yield chunk;
    }
    throw new ApiError(0, "The connection ended before the answer did.");
  }

  async #fetch(path, { headers = {}, ...options } = {}) {
    if (this.key) headers.authorization = `Bearer ${this.key}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      throw error.name === "AbortError" ? error : new ApiError(0, "The server cannot be reached.");
    }
    if (response.ok) return response;
    const text = await response.text();
    let error = {};
    try {
      error = JSON.parse(text).error ?? {};
    } catch {
      error.message = text.slice(0, 500); // not from this server: a proxy's own page, say
    }
    const wait = response.headers.get("retry-after");
    const message = error.message || response.statusText || "no reason given";
    throw new ApiError(response.status, wait ? `${message} (try again in ${wait} s)` : message, error.param);
  }
}

/** The data of server-sent events, one string each. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // already closed, or aborted
  }
}
