/**
 * Markdown to elements: paragraphs, headings, lists, quotes, code, tables, emphasis, links. Model text only becomes text nodes,
 * line breaks stay (the style sheet has pre-wrap, for models mean those that they write), links lead to http, https and mailto only, images are links. Whatever is not understood stays as it was written.
 */
import { copyButton, h } from "./dom.js";

const MARKER = /^( {0,12})([-*+]|\d{1,9}[.)])(?: +|$)/;
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const DIVIDER = /^\|? *:?-+:? *(?:\| *:?-+:? *)*\|?$/;
const DEEPEST = 6; // lists in quotes in lists: deeper ones are shown as text

/** Shows `text` in `parent`. Called again with a longer text it touches only the blocks that changed, which keeps streaming cheap. */
export function render(parent, text) {
  const parts = blocks(text.split("\n"));
  parts.forEach((block, i) => {
    const old = parent.children[i];
    if (old?.source === block.source) return;
    const element = show(block, 0);
    element.source = block.source;
    if (old) old.replaceWith(element);
    else parent.append(element);
  });
  while (parent.children.length > parts.length) parent.lastChild.remove();
}

// ------------------------------------------------------------------------------------------------------------- blocks

function blocks(lines) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const kind = kindOf(lines, at);
    const end = ENDS[kind](lines, at);
    const own = lines.slice(at, end);
    found.push({ kind, lines: own, source: `${kind}\n${own.join("\n")}` });
    at = end;
  }
  return found;
}

function kindOf(lines, at) {
  const line = lines[at];
  if (FENCE.test(line)) return "code";
  if (HEADING.test(line)) return "heading";
  if (RULE.test(line)) return "rule";
  if (QUOTE.test(line)) return "quote";
  if (MARKER.test(line)) return "list";
  if (line.includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && DIVIDER.test(lines[at + 1].trim())) return "table";
  return "paragraph";
}

/** Where a block of each kind ends. */
const ENDS = {
  code(lines, at) {
    const fence = FENCE.exec(lines[at])[1];
    for (at++; at < lines.length; at++) {
      const line = lines[at].trim();
      if (line.startsWith(fence) && line === fence[0].repeat(line.length)) return at + 1;
    }
    return at; // not closed: still being written
  },
  heading: (lines, at) => at + 1,
  rule: (lines, at) => at + 1,
  quote: (lines, at) => while_(lines, at, (line) => QUOTE.test(line)),
  table: (lines, at) => while_(lines, at, (line) => line.includes("|")),
  list(lines, at) {
    const [, indent, mark] = MARKER.exec(lines[at]);
    for (at++; at < lines.length; at++) {
      const line = lines[at];
      const marker = MARKER.exec(line);
      if (marker && marker[1].length <= indent.length && isOrdered(marker[2]) !== isOrdered(mark)) return at;
      if (marker || line.startsWith(`${indent}  `)) continue;
      const next = line.trim() ? line : lines[at + 1] ?? "";
      if (line.trim() ? kindOf(lines, at) !== "paragraph" || !lines[at - 1].trim() : !MARKER.test(next) && !next.startsWith(`${indent}  `)) return at;
    }
    return at;
  },
  paragraph: (lines, at) => while_(lines, at, (line, i) => line.trim() && (i === at || kindOf(lines, i) === "paragraph")),
};

function while_(lines, at, holds) {
  while (at < lines.length && holds(lines[at], at)) at++;
  return at;
}

const isOrdered = (mark) => mark.length > 1;

function show({ kind, lines }, depth) {
  if (depth > DEEPEST) return paragraph(lines);
  return { code, heading, rule: () => h("hr"), quote, list, table, paragraph }[kind](lines, depth);
}

function paragraph(lines) {
  const element = h("p");
  inline(element, lines.join("\n"));
  return element;
}

function heading(lines) {
  const [, marks, text] = HEADING.exec(lines[0]);
  const element = h(`h${Math.min(marks.length + 2, 6)}`); // the page has its own h1 and h2
  inline(element, text.trimEnd().replace(/ #+$/, ""));
  return element;
}

function code(lines) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const last = lines.at(-1).trim();
  const closed = lines.length > 1 && last.startsWith(fence) && last === fence[0].repeat(last.length);
  const text = lines.slice(1, closed ? -1 : undefined).join("\n");
  return h("figure", { class: "code" }, h("figcaption", {}, h("span", {}, language.trim() || "text"), copyButton(() => text)),
    h("pre", { tabindex: 0 }, h("code", {}, text)));
}

function quote(lines, depth) {
  return within(h("blockquote"), lines.map((line) => line.replace(QUOTE, "")), depth);
}

function within(element, lines, depth) {
  element.append(...blocks(lines).map((block) => show(block, depth + 1)));
  return element;
}

function list(lines, depth) {
  const [, indent, mark] = MARKER.exec(lines[0]);
  const items = [];
  let width = 0;
  for (const line of lines) {
    const marker = MARKER.exec(line);
    if (marker && (marker[1].length <= indent.length + 1 || !items.length)) {
      width = marker[0].length;
      items.push([line.slice(width)]);
    } else {
      items.at(-1).push(line.slice(Math.min(width, line.length - line.trimStart().length)));
    }
  }
  const element = h(isOrdered(mark) ? "ol" : "ul", isOrdered(mark) ? { start: parseInt(mark, 10) } : {});
  for (const own of items) {
    const item = within(h("li"), own, depth);
    if (item.firstChild?.tagName === "P") item.firstChild.replaceWith(...item.firstChild.childNodes); // no gaps between short items
    element.append(item);
  }
  return element;
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|");
  const row = (tag, line) => h("tr", {}, cells(line).map((text) => {
    const cell = h(tag);
    inline(cell, text.trim());
    return cell;
  }));
  return h("div", { class: "table", tabindex: 0 }, h("table", {}, h("thead", {}, row("th", lines[0])),
    h("tbody", {}, lines.slice(2).map((line) => row("td", line)))));
}

// ------------------------------------------------------------------------------------------------------------- inline

const LINK = /!?\[([^[\]]*)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:\s+"[^"]*")?\)/y;
const BARE = /https?:\/\/[^\s<>"'`]*[^\s<>"'`.,;:!?)\]*_]/y;
const EMPHASIS = [["**", "strong"], ["__", "strong"], ["~~", "s"], ["*", "em"], ["_", "em"]];
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

function inline(parent, text, depth = 0) {
  const unclosed = new Set(); // delimiters known to have no end, so that no text costs more than a few passes
  let plain = "";
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const add = (element) => {
    flush();
    parent.append(element);
  };
  for (let i = 0; i < text.length; ) {
    const special = SPECIAL[text[i]]?.(text, i, unclosed, depth);
    if (special) {
      if (typeof special.node === "string") plain += special.node;
      else add(special.node);
      i = special.end;
    } else plain += text[i++];
  }
  flush();
}

function at(pattern, text, i) {
  pattern.lastIndex = i;
  return pattern.exec(text);
}

function link(text, i) {
  const found = at(LINK, text, i);
  if (!found) return null;
  const node = anchor(found[2], found[1] || found[2]);
  return node && { node, end: i + found[0].length };
}

/** A link, or null if it leads anywhere but to the web or to an address for mail. */
function anchor(target, text) {
  const url = URL.parse?.(target) ?? parsed(target);
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, text);
}

function parsed(target) {
  try {
    return new URL(target);
  } catch {
    return null;
  }
}

function codeSpan(text, i, unclosed) {
  const [ticks] = at(/`+/y, text, i);
  if (!unclosed.has(ticks)) {
    for (let end = text.indexOf(ticks, i + ticks.length); end >= 0; ) {
      const [run] = at(/`+/y, text, end);
      if (run === ticks) return { node: h("code", {}, text.slice(i + ticks.length, end).replace(/^ (.*[^ ].*) $/s, "$1")), end: end + ticks.length };
      end = text.indexOf(ticks, end + run.length);
    }
    unclosed.add(ticks);
  }
  return { node: ticks, end: i + ticks.length };
}

function emphasis(text, i, unclosed, depth) {
  for (const [mark, tag] of EMPHASIS) {
    if (!text.startsWith(mark, i) || unclosed.has(mark) || depth > DEEPEST) continue;
    const start = i + mark.length;
    if (!/\S/.test(text[start] ?? " ") || text[start] === mark[0] || (mark[0] === "_" && isWord(text[i - 1]))) continue;
    const end = closing(text, start, mark);
    if (end < 0) {
      unclosed.add(mark);
      continue;
    }
    const node = h(tag);
    inline(node, text.slice(start, end), depth + 1);
    return { node, end: end + mark.length };
  }
  const [run] = at(/\*+|_+|~+/y, text, i);
  return { node: run, end: i + run.length };
}

function closing(text, start, mark) {
  for (let end = text.indexOf(mark, start + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    if (mark.length === 1 && (text[end + 1] === mark || text[end - 1] === mark)) continue; // part of a double one
    if (/\S/.test(text[end - 1]) && !(mark[0] === "_" && isWord(text[end + mark.length]))) return end;
  }
  return -1;
}

const SPECIAL = {
  "\\": (text, i) => (/[!-/:-@[-`{-~]/.test(text[i + 1] ?? "") ? { node: text[i + 1], end: i + 2 } : null),
  "`": codeSpan,
  "[": link,
  "!": (text, i) => (text[i + 1] === "[" ? link(text, i) : null),
  h(text, i) {
    const found = !isWord(text[i - 1]) && at(BARE, text, i);
    const node = found && anchor(found[0], found[0]);
    return node && { node, end: i + found[0].length };
  },
  "*": emphasis,
  _: emphasis,
  "~": emphasis,
};
