/** Prometheus text to figures: values by name, rates and percentiles between two scrapes. No DOM. */

const LINE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;

/** One scrape, of one model where the server has several. Names lose the prefix that tells engines apart. */
export class Scrape {
  constructor(text, time, model) {
    this.time = time;
    this.samples = new Map();
    for (const line of text.split("\n")) {
      const found = LINE.exec(line);
      if (!found) continue; // a comment, or an empty line
      const name = found[1].replace(/^(vllm|miniinfer)[:_]/, "");
      const labels = Object.fromEntries([...(found[2] ?? "").matchAll(LABEL)].map(([, key, value]) => [key, value]));
      if (model && labels.model_name && labels.model_name !== model) continue;
      if (!this.samples.has(name)) this.samples.set(name, []);
      this.samples.get(name).push({ labels, value: Number(found[3]) });
    }
  }

  /** The sum over labels (several reasons), or undefined if the server does not have it. */
  sum(name) {
    return this.samples.get(name)?.reduce((total, sample) => total + sample.value, 0);
  }

  /** [[upper bound, count up to it], ...] of a histogram, summed over its other labels. */
  buckets(name) {
    const sums = new Map();
    for (const { labels, value } of this.samples.get(`${name}_bucket`) ?? []) {
      const bound = labels.le === "+Inf" ? Infinity : Number(labels.le);
      sums.set(bound, (sums.get(bound) ?? 0) + value);
    }
    return [...sums].sort((a, b) => a[0] - b[0]);
  }
}

/** A counter's growth; a server that started anew counts from zero. */
export function growth(before, after, name) {
  const [old, now] = [before.sum(name), after.sum(name)];
  if (now === undefined) return undefined;
  return old === undefined || now < old ? now : now - old;
}

export function rate(before, after, name) {
  const grown = growth(before, after, name);
  return grown === undefined ? undefined : grown / ((after.time - before.time) / 1000);
}

/** What a share `q` of the values observed between two scrapes did not exceed, interpolated within its bucket; undefined if there were none. */
export function quantile(before, after, name, q) {
  const old = new Map(before.buckets(name));
  let counts = after.buckets(name).map(([bound, count]) => [bound, count - (old.get(bound) ?? 0)]);
  if (counts.some(([, count]) => count < 0)) counts = after.buckets(name); // the server started anew
  const total = counts.at(-1)?.[1];
  if (!total) return undefined;
  let [lower, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= q * total) return bound === Infinity ? lower : lower + ((bound - lower) * (q * total - below)) / (count - below || 1);
    [lower, below] = [bound, count];
  }
  return lower;
}
