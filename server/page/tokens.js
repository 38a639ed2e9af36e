// Generated text as tokens, coloured by probability, and the alternatives of the one that is pointed at.

import { byId, el, say } from "./dom.js";

const LIMITS = [0.1, 0.3, 0.6, 0.9];
const details = new WeakMap(); // token's element -> the tokens in it, most often one

/** 0 (unlikely) to 4 (nearly certain). */
const level = (logprob) => LIMITS.filter((limit) => Math.exp(logprob) >= limit).length;

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share > 99.95 ? "100 %" : share < 0.05 ? "< 0.1 %" : `${share.toFixed(1)} %`;
};

/** A token with its spaces and line breaks made visible. */
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(nothing)";

/** What a choice says of its tokens, from either format: `[{text, logprob, top: [[text, logprob], …]}, …]`. */
export function tokensOf({ logprobs }) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((token) => ({
      text: token.token,
      logprob: token.logprob,
      top: token.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return logprobs.tokens.map((text, i) => ({
    text,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

/** The text of one answer. */
export class TokenText {
  constructor(name) {
    const label = `Answer of ${name}. Arrow keys step through its tokens.`;
    this.node = el("div.text", { tabindex: 0, role: "group", "aria-label": label, onkeydown: (e) => this.#step(e) });
    this.content = "";
    this.held = [];
    this.node.addEventListener("mouseover", (event) => point(event.target));
    this.node.addEventListener("mouseleave", unpoint);
    this.node.addEventListener("blur", unpoint);
  }

  /** Append a chunk. Its text may come later than its tokens: a stop string or half a character is held back. */
  add(text, tokens) {
    this.content += text;
    this.held.push(...tokens);
    if (!text) return;
    const held = this.held.splice(0);
    if (held.length === 0) this.node.append(text);
    else if (held.map((token) => token.text).join("") === text) {
      for (const token of held) this.#append(token.text, [token]);
    } else this.#append(text, held);
  }

  #append(text, tokens) {
    const lowest = Math.min(...tokens.map((token) => token.logprob ?? 0));
    const span = el("span.token", { "data-p": level(lowest) }, text);
    details.set(span, tokens);
    this.node.append(span);
  }

  #step(event) {
    const spans = [...this.node.querySelectorAll(".token")];
    const now = spans.findIndex((span) => span.classList.contains("pointed"));
    const next = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (next === undefined || spans.length === 0) return;
    event.preventDefault();
    const span = spans[Math.min(spans.length - 1, Math.max(0, next))];
    span.scrollIntoView({ block: "nearest" });
    point(span);
    say(details.get(span).map(spoken).join("; "));
  }
}

function spoken(token) {
  const others = token.top.filter(([text]) => text !== token.text).slice(0, 3);
  const named = others.map(([text, logprob]) => `${visible(text)} ${percent(logprob)}`);
  return `${visible(token.text)} ${percent(token.logprob)}${named.length ? `, instead of ${named.join(", ")}` : ""}`;
}

function rows(token) {
  const known = token.top.some(([text]) => text === token.text);
  const all = known ? token.top : [...token.top, [token.text, token.logprob]];
  return all.map(([text, logprob]) => {
    const bar = el("i.share");
    bar.style.width = `${100 * Math.exp(logprob)}%`;
    const kind = text === token.text ? "tr.chosen" : "tr";
    return el(kind, {}, el("td", {}, el("code", {}, visible(text))), el("td", {}, percent(logprob)), el("td.bar", {}, bar));
  });
}

function point(span) {
  const tokens = details.get(span);
  unpoint();
  if (!tokens) return;
  span.classList.add("pointed");
  const box = byId("alternatives");
  box.replaceChildren(...tokens.slice(0, 4).map((token) => el("table", {}, el("tbody", {}, ...rows(token)))));
  box.hidden = false;
  const place = span.getClientRects()[0];
  const own = box.getBoundingClientRect();
  const left = Math.min(place.left, document.documentElement.clientWidth - own.width - 8);
  const below = place.bottom + 6;
  const top = below + own.height > window.innerHeight ? place.top - own.height - 6 : below;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${Math.max(8, top)}px`;
}

export function unpoint() {
  byId("alternatives").hidden = true;
  for (const span of document.querySelectorAll(".pointed")) span.classList.remove("pointed");
}
