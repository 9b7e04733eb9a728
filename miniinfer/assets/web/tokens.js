/** An answer as its tokens: each shaded by how unlikely it was, its alternatives shown under the pointer or by arrow keys. */
import { $, h } from "./dom.js";

const SPECIAL = /^(<[|｜].*[|｜]>|<\/?s>)$/; // the end of a turn is a token, too, though no text

/** A token as kept: [text, logprob, [[text, logprob], ...]]. `decoder` joins characters that are spread over tokens. */
export function compact(entry, decoder) {
  const text = entry.bytes?.length ? decoder.decode(new Uint8Array(entry.bytes), { stream: true }) : entry.token;
  return [text, entry.logprob, (entry.top_logprobs ?? []).map((top) => [top.token, top.logprob])];
}

/** An element to which `append` adds the tokens that are new. */
export class TokenView {
  constructor(tokens) {
    this.tokens = tokens;
    this.at = -1;
    this.element = h("div", {
      class: "tokens", tabindex: 0, role: "group", "aria-label": "Tokens and their probabilities; left and right arrow keys move",
      onmouseover: ({ target }) => this.#pick(target),
      onclick: ({ target }) => this.#pick(target),
      onmouseleave: () => this.#hide(),
      onblur: () => this.#hide(),
      onkeydown: (event) => this.#key(event),
    });
    this.append();
  }

  append() {
    for (const [text, logprob] of this.tokens.slice(this.element.children.length)) {
      const unlikely = 1 - Math.exp(logprob);
      const span = h("span", { class: SPECIAL.test(text) && "special" }, text);
      span.style.setProperty("--unlikely", `${Math.round(unlikely * 60)}%`);
      this.element.append(span);
    }
  }

  #pick(target) {
    const index = [...this.element.children].indexOf(target);
    if (index >= 0) this.#show(index);
  }

  #key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.#hide();
    if (!step) return;
    event.preventDefault();
    this.#show(Math.min(Math.max(this.at + step, 0), this.tokens.length - 1));
  }

  #show(index) {
    this.#hide();
    this.at = index;
    const span = this.element.children[index];
    const [text, logprob, tops] = this.tokens[index];
    const rows = tops.some(([other, value]) => value === logprob && (other === text || !text)) ? tops : [[text, logprob], ...tops];
    let taken = false;
    $("tip").replaceChildren(h("table", {}, rows.map(([other, value]) => {
      const chosen = !taken && value === logprob;
      taken ||= chosen;
      const share = Math.exp(value);
      const bar = h("i");
      bar.style.width = `${share * 100}%`;
      return h("tr", { class: chosen && "chosen" }, h("td", { class: "token" }, visible(other)), h("td", { class: "bar" }, bar),
        h("td", { class: "number" }, percent(share)), h("td", { class: "number faint" }, value > -9999 ? value.toFixed(2) : "−∞"));
    })));
    span.classList.add("picked");
    place($("tip"), span);
  }

  #hide() {
    this.element.children[this.at]?.classList.remove("picked");
    $("tip").hidden = true;
  }
}

function percent(share) {
  return share >= 0.0995 ? `${(share * 100).toFixed(1)} %` : share >= 0.0001 ? `${(share * 100).toFixed(2)} %` : "< 0.01 %";
}

/** White space and nothing, so that one sees them. */
function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
}

/** Below `anchor`'s first line, or above it where there is no room. */
function place(tip, anchor) {
  tip.hidden = false;
  const box = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = tip;
  const below = box.bottom + 6;
  tip.style.left = `${Math.max(8, Math.min(box.left, innerWidth - width - 8))}px`;
  tip.style.top = `${below + height < innerHeight ? below : Math.max(8, box.top - height - 6)}px`;
}
