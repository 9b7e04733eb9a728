/** The live figures: scrapes /metrics while the page is seen, and draws the last minutes as small line charts. */
import { $, h } from "./dom.js";
import { Scrape, growth, quantile, rate } from "./metrics.js";

const INTERVAL = 2000;
const SPAN = 5 * 60_000;
const RECENT = 60_000; // what percentiles and shares are taken over
const [WIDTH, HEIGHT] = [300, 90];

const number = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 2 : value < 100 ? 1 : 0 });
const whole = (value) => Math.round(value).toLocaleString("en");
const percent = (value) => `${(value * 100).toLocaleString("en", { maximumFractionDigits: value < 0.01 ? 2 : value < 0.1 ? 1 : 0 })} %`;
const seconds = (value) => (value < 1 ? `${number(value * 1000)} ms` : `${value.toFixed(2)} s`);

/** Each chart: title, what it means, how a value is written, and its lines as (now, the scrape before, the one a minute ago) => value. */
const CHARTS = [
  ["Generation", "tokens per second", number, { generated: (now, last) => rate(last, now, "generation_tokens_total") }],
  ["Prompts", "tokens per second", number, { read: (now, last) => rate(last, now, "prompt_tokens_total") }],
  ["Time to first token", "over the last minute", seconds, percentiles("time_to_first_token_seconds")],
  ["Time per output token", "over the last minute", seconds, percentiles("inter_token_latency_seconds")],
  ["Requests", "in the batch, and waiting for a place", whole,
    { running: (now) => now.sum("num_requests_running"), waiting: (now) => now.sum("num_requests_waiting") }],
  ["KV cache", "share of the pages in use", percent, { used: (now) => now.sum("kv_cache_usage_perc") }, 1],
  ["Prefix cache", "hits over the last minute", percent, { found: hitRate }, 1],
  ["Batch", "tokens per step of the engine", number, { size: batch }],
  ["Answers", "per second", number,
    { ended: (now, last) => rate(last, now, "request_success_total"), errors: (now, last) => rate(last, now, "request_errors_total") ?? 0 }],
];

function percentiles(name) {
  return { p50: (now, last, recent) => quantile(recent, now, name, 0.5), p95: (now, last, recent) => quantile(recent, now, name, 0.95) };
}

function batch(now, last) {
  const steps = growth(last, now, "engine_steps_total");
  return steps ? growth(last, now, "generation_tokens_total") / steps : undefined;
}

function hitRate(now, last, recent) {
  const asked = growth(recent, now, "prefix_cache_queries_total");
  return asked ? growth(recent, now, "prefix_cache_hits_total") / asked : undefined;
}

export class Live {
  constructor(api) {
    this.api = api;
    this.scrapes = [];
    this.charts = CHARTS.map((about) => new Chart(...about));
    $("charts").append(...this.charts.map((chart) => chart.element));
    document.addEventListener("visibilitychange", () => document.hidden || this.#tick());
  }

  /** Begins, once, to scrape; goes on until the page is closed. */
  start() {
    if (!this.timer) this.#tick();
  }

  /** The model whose figures are shown. */
  show(model) {
    if (model === this.model) return;
    this.model = model;
    this.scrapes = [];
    for (const chart of this.charts) chart.points = [];
  }

  async #tick() {
    clearTimeout(this.timer);
    if (document.hidden) return; // a page that nobody sees costs the server nothing
    this.timer = setTimeout(() => this.#tick(), INTERVAL);
    try {
      this.#take(new Scrape(await this.api.metrics(), Date.now(), this.model));
      $("live-state").textContent = `every ${INTERVAL / 1000} s while this page is seen`;
    } catch (error) {
      $("live-state").textContent = error.message;
    }
  }

  #take(now) {
    const last = this.scrapes.at(-1);
    if (last && now.time <= last.time) return;
    const recent = this.scrapes.find((scrape) => scrape.time >= now.time - RECENT) ?? last;
    this.scrapes.push(now);
    this.scrapes = this.scrapes.filter((scrape) => scrape.time >= now.time - RECENT);
    if (last) for (const chart of this.charts) chart.add(now, last, recent);
  }
}

class Chart {
  constructor(title, meaning, format, lines, top = 0) {
    Object.assign(this, { title, format, lines, top, points: [] });
    const names = Object.keys(lines);
    this.values = names.map(() => h("b", {}, "–"));
    this.paths = names.map((_, i) => svg("path", { class: `line line${i}` }));
    this.area = svg("path", { class: "area" });
    this.cursor = svg("line", { class: "cursor", y1: 0, y2: HEIGHT });
    this.limit = h("span", { class: "limit" });
    this.since = h("span");
    this.picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      this.area, ...this.paths.toReversed(), this.cursor);
    this.element = h("section", { class: "chart" },
      h("header", {}, h("h3", {}, title), h("span", { class: "faint" }, meaning)),
      h("p", { class: "values" }, names.map((name, i) => h("span", { class: `value value${i}` }, this.values[i],
        names.length > 1 && h("span", { class: "faint" }, ` ${name}`)))),
      h("div", { class: "plot" }, this.limit, this.picture), h("footer", {}, this.since, h("span", {}, "now")));
    this.picture.addEventListener("pointermove", (event) => this.#point(event));
    this.picture.addEventListener("pointerleave", () => this.#draw());
  }

  add(now, last, recent) {
    this.points.push({ time: now.time, values: Object.values(this.lines).map((line) => line(now, last, recent)) });
    this.points = this.points.filter((point) => point.time >= now.time - SPAN);
    this.#draw();
  }

  #draw() {
    const last = this.points.at(-1);
    if (!last) return;
    const highest = Math.max(this.top, ...this.points.flatMap((point) => point.values.map((value) => value ?? 0)));
    this.span = Math.min(SPAN, Math.max(last.time - this.points[0].time, RECENT));
    this.since.textContent = `${Math.round(this.span / 6000) / 10} min ago`;
    const scale = this.top || round(highest) || 1;
    const x = ({ time }) => WIDTH - ((last.time - time) / this.span) * WIDTH;
    const y = (value) => HEIGHT - 1 - (value / scale) * (HEIGHT - 4);
    this.paths.forEach((path, i) => path.setAttribute("d", trace(this.points, i, x, y)));
    this.area.setAttribute("d", trace(this.points, 0, x, y, HEIGHT));
    this.limit.textContent = highest ? this.format(scale) : "";
    this.cursor.setAttribute("visibility", "hidden");
    this.#show(last);
    this.picture.setAttribute("aria-label", `${this.title}: ${this.values.map((value) => value.textContent).join(", ")} now`);
  }

  /** The values at the pointer instead of the last ones. */
  #point(event) {
    const last = this.points.at(-1);
    if (!last) return;
    const box = this.picture.getBoundingClientRect();
    const time = last.time - (1 - (event.clientX - box.left) / box.width) * this.span;
    const near = this.points.reduce((best, point) => (Math.abs(point.time - time) < Math.abs(best.time - time) ? point : best));
    const at = WIDTH - ((last.time - near.time) / this.span) * WIDTH;
    this.cursor.setAttribute("x1", at);
    this.cursor.setAttribute("x2", at);
    this.cursor.setAttribute("visibility", "visible");
    this.#show(near);
  }

  #show(point) {
    point.values.forEach((value, i) => (this.values[i].textContent = value === undefined ? "–" : this.format(value)));
  }
}

/** A path through the points that have a value, in pieces; with `floor`, the pieces' area down to it. */
function trace(points, line, x, y, floor) {
  let path = "";
  let from = null;
  points.forEach((point, i) => {
    const value = point.values[line];
    if (value === undefined) return;
    const [px, py] = [x(point).toFixed(1), y(value).toFixed(1)];
    if (from === null) path += floor ? `M${px} ${floor}L${px} ${py}` : `M${px} ${py}`;
    else path += `L${px} ${py}`;
    from ??= px;
    if (points[i + 1]?.values[line] === undefined) {
      path += floor ? `L${px} ${floor}Z` : px === from ? "h.5" : "";
      from = null;
    }
  });
  return path;
}

/** The next 1, 2 or 5 times a power of ten. */
function round(value) {
  if (!value) return 0;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].find((step) => step * unit >= value * 0.999) * unit;
}

function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
