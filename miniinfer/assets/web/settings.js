/** How a conversation is answered: the form, and the request's fields made from it. A field left empty is the server's to decide. */
import { $, h } from "./dom.js";
import { ApiError } from "./api.js";

const NUMBERS = [
  ["temperature", "Temperature"],
  ["max_tokens", "Max tokens"],
  ["top_p", "Top p"],
  ["top_k", "Top k"],
  ["min_p", "Min p"],
  ["seed", "Seed"],
  ["presence_penalty", "Presence penalty"],
  ["frequency_penalty", "Frequency penalty"],
  ["repetition_penalty", "Repetition penalty"],
];
const WHOLE = ["max_tokens", "top_k", "seed"];
const TOP_LOGPROBS = 5;

export const DEFAULTS = { system: "", stop: "", effort: "", format: "text", schema: "", tools: "", template: "", logprobs: false };

/** Fills the form's numbers in; `changed(name, value)` is called for every change. */
export class SettingsForm {
  constructor(changed) {
    $("numbers").append(...NUMBERS.map(([name, label]) => h("label", {}, label,
      h("input", { name, inputmode: "decimal", autocomplete: "off", placeholder: "default" }))));
    this.form = $("settings-form");
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", ({ target }) => {
      changed(target.name, target.type === "checkbox" ? target.checked : target.value);
      this.mark(null);
      this.#adapt();
    });
  }

  show(settings) {
    for (const field of this.form.elements) {
      if (!field.name) continue;
      const value = settings[field.name] ?? DEFAULTS[field.name] ?? "";
      if (field.type === "checkbox") field.checked = value;
      else field.value = value;
    }
    this.mark(null);
    this.#adapt();
  }

  /** Points at the field that the server, or toBody, refused; null for none. */
  mark(param) {
    const name = { response_format: "schema", chat_template_kwargs: "template", reasoning_effort: "effort", max_completion_tokens: "max_tokens" }[param] ?? param;
    for (const field of this.form.elements) {
      if (field.name) field.setAttribute("aria-invalid", field.name === name);
    }
  }

  #adapt() {
    $("schema-field").hidden = this.form.elements.format.value !== "json_schema";
  }
}

/** The request's fields. ApiError, naming the field, for what cannot be sent. */
export function toBody(settings) {
  const body = {};
  for (const [name, label] of NUMBERS) {
    const text = (settings[name] ?? "").trim();
    if (!text) continue;
    body[name] = Number(text);
    if (Number.isNaN(body[name])) throw new ApiError(400, `${label}: “${text}” is not a number.`, name);
    if (WHOLE.includes(name) && !Number.isSafeInteger(body[name])) throw new ApiError(400, `${label}: “${text}” is not a whole number.`, name);
  }
  const stops = (settings.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (settings.effort) body.reasoning_effort = settings.effort;
  if (settings.format === "json_object") body.response_format = { type: "json_object" };
  if (settings.format === "json_schema") {
    const schema = json(settings, "schema", "JSON schema") ?? { type: "object" };
    body.response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
  }
  const tools = json(settings, "tools", "Tools");
  if (tools) body.tools = tools.map?.((tool) => (tool.type ? tool : { type: "function", function: tool })) ?? tools;
  const variables = json(settings, "template", "Template variables");
  if (variables) body.chat_template_kwargs = variables;
  if (settings.logprobs) Object.assign(body, { logprobs: true, top_logprobs: TOP_LOGPROBS });
  return body;
}

function json(settings, name, label) {
  const text = (settings[name] ?? "").trim();
  if (!text) return null;
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ApiError(400, `${label}: not valid JSON (${error.message})`, name);
  }
}
