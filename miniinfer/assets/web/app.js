/** The page: puts its parts together. Owns the tabs, the list of conversations, the model, the key, and the keyboard. */
import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { $, download, growing, h } from "./dom.js";
import { Live } from "./live.js";
import { DEFAULTS, SettingsForm } from "./settings.js";
import { Store, preference } from "./store.js";

const api = new Api();
const store = new Store();
const live = new Live(api);
const form = new SettingsForm((name, value) => {
  chat.chat.settings[name] = value;
  preference("settings", chat.chat.settings); // what a new conversation begins with
  if (chat.chat.messages.length) store.save(chat.chat);
});
const chat = new Chat(api, store, { changed: list, unauthorized: askKey, refused });
let models = [];

// -------------------------------------------------------------------------------------------------------- conversations

function open(conversation) {
  if (models.length && !models.some((model) => model.id === conversation.model)) conversation.model = models[0].id;
  choose(conversation.model);
  $("notice").textContent = "";
  form.show(conversation.settings);
  chat.show(conversation);
  list();
}

function choose(model) {
  $("model").value = model ?? "";
  live.show(model);
}

function fresh() {
  const empty = store.chats.find((other) => !other.messages.length);
  open(empty ?? store.create(preference("settings") ?? DEFAULTS, chat.chat?.model ?? models[0]?.id));
  drawer(null);
  $("prompt").focus();
}

function list() {
  if (chat.chat.messages.length) $("new").removeAttribute("aria-current");
  else $("new").setAttribute("aria-current", "true");
  $("chats").replaceChildren(...store.chats.filter((one) => one.messages.length).map((one) => {
    const current = one === chat.chat;
    const title = h("button", { type: "button", class: "title", "aria-current": current && "true", onclick: () => (open(one), drawer(null)) },
      one.title);
    const act = (label, run) => h("button", { type: "button", class: "quiet", onclick: run }, label);
    return h("li", { class: current && "current" }, title, current && h("div", { class: "actions" },
      act("Rename", () => rename(one, title)), act("Export", () => download(`${one.title}.json`, JSON.stringify(one, null, 2))),
      act("Delete", () => remove(one))));
  }));
}

function rename(one, title) {
  const field = h("input", { "aria-label": "Name of the conversation", class: "title" });
  field.value = one.title;
  const done = (keep) => {
    if (keep && field.value.trim()) one.title = field.value.trim();
    store.save(one);
    list();
  };
  field.addEventListener("blur", () => done(true), { once: true });
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") field.value = one.title;
    if (event.key === "Enter" || event.key === "Escape") event.stopPropagation(), field.blur();
  });
  title.replaceWith(field);
  field.select();
}

function remove(one) {
  if (!confirm(`Delete “${one.title}”?`)) return;
  chat.stop();
  store.remove(one);
  if (store.chats.length) open(store.chats[0]);
  else fresh();
}

// ---------------------------------------------------------------------------------------------------- models and the key

async function loadModels() {
  try {
    models = await api.models();
  } catch (error) {
    $("notice").textContent = error.message;
    if (error.status === 401) askKey(loadModels);
    return;
  }
  $("notice").textContent = "";
  $("model").replaceChildren(...models.map(({ id }) => h("option", { value: id }, id)));
  const { chat: current } = chat;
  if (!models.some((model) => model.id === current.model)) current.model = models[0]?.id;
  choose(current.model);
  if (!current.messages.length) open(current);
  live.start();
}

chat.about = (id) => {
  const length = models.find((model) => model.id === id)?.max_model_len;
  return length ? `${length.toLocaleString("en")} tokens of context` : "";
};

/** Asks for the API key, then does again what failed for want of it. */
function askKey(retry) {
  const dialog = $("key-dialog");
  $("key-state").textContent = api.key ? "The server does not know this key." : "This server asks for an API key.";
  $("key").value = api.key;
  $("key-form").onsubmit = (event) => {
    event.preventDefault();
    api.key = $("key").value.trim();
    dialog.close();
    if (retry !== loadModels && !models.length) loadModels();
    retry();
  };
  if (!dialog.open) dialog.showModal();
}

function refused(param) {
  form.mark(param);
}

// ------------------------------------------------------------------------------------------------------- tabs and panels

function tab() {
  const name = location.hash === "#live" ? "live" : "chat";
  for (const each of ["chat", "live"]) {
    $(each).hidden = each !== name;
    $(`tab-${each}`).setAttribute("aria-selected", each === name);
    $(`tab-${each}`).tabIndex = each === name ? 0 : -1;
  }
  document.body.dataset.tab = name;
}

/** On narrow screens the side panels lie over the conversation, one at a time; null for none. */
function drawer(name) {
  for (const each of ["list", "settings"]) {
    $(each).classList.toggle("open", each === name);
    $(`open-${each}`).setAttribute("aria-expanded", each === name);
  }
}

function panel(name) {
  if (matchMedia(name === "list" ? "(max-width: 50rem)" : "(max-width: 75rem)").matches) drawer($(name).classList.contains("open") ? null : name);
  else $("chat").classList.toggle(`no-${name}`, preference(`no-${name}`, !$("chat").classList.contains(`no-${name}`)));
}

for (const name of ["list", "settings"]) {
  $(`open-${name}`).addEventListener("click", () => panel(name));
  $("chat").classList.toggle(`no-${name}`, Boolean(preference(`no-${name}`)));
}
for (const [name, other] of [["chat", "live"], ["live", "chat"]]) {
  $(`tab-${name}`).addEventListener("click", () => ((location.hash = name), tab()));
  $(`tab-${name}`).addEventListener("keydown", ({ key }) => {
    if (key === "ArrowLeft" || key === "ArrowRight") location.hash = other, $(`tab-${other}`).focus();
  });
}
addEventListener("hashchange", tab);

// ---------------------------------------------------------------------------------------------------- input and keyboard

const fit = growing($("prompt"));

function send() {
  const text = $("prompt").value;
  if (!text.trim() || !chat.send(text)) return;
  $("prompt").value = "";
  fit();
}

$("composer").addEventListener("submit", (event) => (event.preventDefault(), send()));
$("stop").addEventListener("click", () => (chat.stop(), $("prompt").focus()));
$("new").addEventListener("click", fresh);
$("model").addEventListener("change", ({ target }) => {
  chat.chat.model = target.value;
  live.show(target.value);
  if (chat.chat.messages.length) store.save(chat.chat);
  else open(chat.chat);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Enter" && !event.shiftKey) event.preventDefault(), send();
  if (event.key === "ArrowUp" && !$("prompt").value) event.preventDefault(), chat.editLast();
});
document.addEventListener("keydown", (event) => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement.tagName);
  if (event.key === "Escape") chat.stop(), drawer(null);
  else if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) event.preventDefault(), $("prompt").focus();
  else if (event.altKey && event.code === "KeyN") event.preventDefault(), fresh();
});
addEventListener("pagehide", () => chat.chat.messages.length && store.save(chat.chat));

tab();
open(store.chats[0] ?? store.create(preference("settings") ?? DEFAULTS));
loadModels();
if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
