// The server's load, read from /metrics: every two seconds while somebody looks, less often when it fails.

import { call } from "./api.js";
import { byId, el } from "./dom.js";

const PERIOD = 2000;
const LONGEST_PERIOD = 30000;
const KEPT = 40; // rates in the little curve

/** Prometheus' text to sums by name: labels are added up. */
export function sums(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    if (!line || line.startsWith("#")) continue;
    const name = /^[a-zA-Z_:][a-zA-Z0-9_:]*/.exec(line)?.[0];
    const value = Number(line.slice(line.lastIndexOf(" ") + 1));
    if (name && Number.isFinite(value)) found.set(name, (found.get(name) ?? 0) + value);
  }
  return found;
}

const whole = (value) => (value === undefined ? "–" : Math.round(value).toLocaleString("en"));
const percent = (part, all) => (all ? `${Math.round((100 * part) / all)} %` : "–");

class Gauge {
  constructor(list, label, title, drawing) {
    this.value = el("dd.value", {}, "–");
    this.drawing = drawing;
    list.append(el("div.gauge", { title }, el("dt", {}, label), this.value, drawing && el("dd.drawing", {}, drawing)));
  }

  set(text, share) {
    this.value.textContent = text;
    if (this.drawing && share !== undefined) this.drawing.value = Number.isFinite(share) ? share : 0;
  }
}

class Curve {
  constructor() {
    this.rates = [];
    this.line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
    this.node = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.node.setAttribute("viewBox", `0 0 ${KEPT - 1} 10`);
    this.node.setAttribute("preserveAspectRatio", "none");
    this.node.setAttribute("aria-hidden", "true");
    this.node.append(this.line);
  }

  add(rate) {
    this.rates = [...this.rates, rate].slice(-KEPT);
    const top = Math.max(1, ...this.rates);
    const first = KEPT - this.rates.length;
    const points = this.rates.map((value, i) => `${first + i},${(9.5 - (9 * value) / top).toFixed(2)}`);
    this.line.setAttribute("points", points.join(" "));
  }
}

/** Start to show the load; it pauses while the tab is hidden. Returns what asks at once. */
export function startGauges() {
  const list = byId("gauges");
  const bar = (label) => el("meter", { min: 0, max: 1, high: 0.9, low: 0.9, optimum: 0, "aria-label": label });
  const curve = new Curve();
  const running = new Gauge(list, "Running", "Answers being generated");
  const waiting = new Gauge(list, "Waiting", "Requests that wait for their turn");
  const rate = new Gauge(list, "Tokens/s", "Generated tokens per second, all clients together", curve.node);
  const cache = new Gauge(list, "KV cache", "Blocks of the KV cache that running requests use", bar("KV cache in use"));
  const rows = new Gauge(list, "Rows resident", "Tasks whose scales are on the device", bar("Rows in use"));
  const hits = new Gauge(list, "Prefix hits", "Share of prompt tokens that were found computed");
  let before = null;
  let period = PERIOD;
  let timer = null;
  let busy = false;

  function draw(found) {
    const now = { time: performance.now(), tokens: found.get("peqa_generation_tokens_total") ?? 0 };
    if (before && now.tokens >= before.tokens) {
      const perSecond = (1000 * (now.tokens - before.tokens)) / (now.time - before.time);
      rate.set(perSecond < 10 ? perSecond.toFixed(1) : whole(perSecond));
      curve.add(perSecond);
    }
    before = now;
    const share = (name) => found.get(`peqa_${name}_used`) / found.get(`peqa_${name}`);
    running.set(whole(found.get("peqa_requests_running")));
    waiting.set(whole(found.get("peqa_requests_waiting")));
    cache.set(percent(found.get("peqa_kv_blocks_used"), found.get("peqa_kv_blocks")), share("kv_blocks"));
    const places = found.get("peqa_task_rows");
    rows.set(places === undefined ? "–" : `${whole(found.get("peqa_task_rows_used"))} of ${whole(places)}`, share("task_rows"));
    hits.set(percent(found.get("peqa_engine_prefix_cache_hits_total"), found.get("peqa_engine_prefix_cache_queries_total")));
  }

  async function poll() {
    clearTimeout(timer);
    if (busy) return;
    busy = true;
    try {
      draw(sums(await (await call("metrics", { quiet: true })).text()));
      period = PERIOD;
      list.classList.remove("stale");
      list.hidden = false;
    } catch (error) {
      period = Math.min(LONGEST_PERIOD, 2 * period); // no key yet, or the server is away
      list.classList.add("stale");
      list.hidden = error.status === 403; // nothing to see, or to ask again, with this key
    }
    busy = false;
    if (!document.hidden && !list.hidden) timer = setTimeout(poll, period);
  }

  document.addEventListener("visibilitychange", () => {
    clearTimeout(timer);
    before = null;
    if (!document.hidden) poll();
  });
  if (!document.hidden) poll();
  return poll;
}
