// The same prompt to several tasks at once: one column each, with its answer, its speed and its state.

import { Problem, call, events } from "./api.js";
import { byId, counted, el, say, show } from "./dom.js";
import { TokenText, tokensOf, unpoint } from "./tokens.js";

const MAX_COLUMNS = 5; // a browser opens six connections to a server of HTTP/1; the gauges use one
const TOP = 5;
const ENDS = { stop: "Done", length: "Stopped at max tokens", tool_calls: "Done", abort: "Ended by the server" };

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

/** A column's name: "sql", or "sql@0123456789ab" for a revision that is not the current one. */
export const labelOf = (task, revision) => (revision ? `${task}@${revision.slice(0, 12)}` : task);

class Column {
  constructor(name, remove) {
    this.name = name;
    this.turns = []; // of the conversation, in chat mode
    const fact = (label) => {
      const value = el("dd", {}, "–");
      return [value, el("div", {}, el("dt", {}, label), value)];
    };
    const [first, firstRow] = fact("First token");
    const [rate, rateRow] = fact("Tokens/s");
    const [count, countRow] = fact("Tokens");
    Object.assign(this, { first, rate, count });
    this.state = el("p.state", {}, "Ready");
    this.revision = el("code.revision");
    this.body = el("div.body");
    const cross = el("button.quiet.remove", { type: "button", "aria-label": `Remove ${name}`, title: "Remove", onclick: remove }, "×");
    this.node = el(
      "article.card.column", { "aria-label": name },
      el("header", {}, el("h3", {}, name), this.revision, cross),
      el("dl.facts", {}, firstRow, rateRow, countRow),
      this.body,
      this.state,
    );
  }

  clear() {
    this.turns = [];
    this.body.replaceChildren();
    this.#tell("Ready", "");
    for (const value of [this.first, this.rate, this.count]) value.textContent = "–";
  }

  #tell(text, kind) {
    this.state.textContent = text;
    this.node.dataset.state = kind;
  }

  /** Send `body` and show what comes; never throws. `message`: the user's, in chat mode. */
  async run(body, message, system, signal) {
    if (message === null) this.clear();
    const text = new TokenText(this.name);
    const asked = message === null ? null : el("p.user", {}, message);
    this.body.append(...[asked, text.node].filter(Boolean));
    this.#tell("Waiting for the first token …", "busy");
    text.node.setAttribute("aria-busy", "true");
    try {
      const end = await this.#stream(this.#request(body, message, system), text, signal);
      this.#tell(text.content ? (ENDS[end] ?? "Done") : "Done: the answer is empty", "done");
    } catch (error) {
      if (error.name === "AbortError") this.#tell("Stopped", "stopped");
      else this.#tell(error.message, "failed");
      if (!text.content) {
        text.node.remove();
        asked?.remove();
      }
    }
    text.node.removeAttribute("aria-busy");
    if (message !== null && text.content) {
      this.turns.push({ role: "user", content: message }, { role: "assistant", content: text.content });
    }
    const tokens = Number(this.count.textContent) || 0; // a dash: none has come
    say(`${this.name}: ${this.state.textContent}, ${counted(tokens, "token")}`);
  }

  #request(body, message, system) {
    const stream = { ...body, task: this.name, stream: true, stream_options: { include_usage: true } };
    if (message === null) return ["v1/completions", { ...stream, logprobs: TOP }];
    const opening = system ? [{ role: "system", content: system }] : [];
    const messages = [...opening, ...this.turns, { role: "user", content: message }];
    return ["v1/chat/completions", { ...stream, messages, logprobs: true, top_logprobs: TOP }];
  }

  async #stream([path, json], text, signal) {
    let sent = 0;
    let first = null;
    let count = 0;
    let end = null;
    const sending = () => {
      sent = performance.now();
    };
    const response = await call(path, { method: "POST", json, signal, sending });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Problem(0, chunk.error.message, chunk.error.code);
      const now = performance.now();
      this.revision.textContent = chunk.revision ? chunk.revision.slice(0, 12) : "";
      for (const choice of chunk.choices) {
        const piece = choice.text ?? choice.delta?.content ?? "";
        const tokens = tokensOf(choice);
        const low = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < 24;
        text.add(piece, tokens);
        if (low) this.body.scrollTop = this.body.scrollHeight;
        end = choice.finish_reason ?? end;
        count += tokens.length || (piece ? 1 : 0);
      }
      count = chunk.usage?.completion_tokens ?? count;
      if (count === 0) continue;
      if (first === null) {
        first = now;
        this.first.textContent = seconds(first - sent);
        this.#tell("Answering …", "busy");
      }
      if (count > 1 && now > first && chunk.choices.length) {
        this.rate.textContent = ((1000 * (count - 1)) / (now - first)).toFixed(1);
      }
      this.count.textContent = String(count);
    }
    return end;
  }
}

/** The form, the columns, and who is in them. `changed()`: called when a column comes or goes. */
export class Compare {
  constructor(changed) {
    this.changed = changed;
    this.columns = new Map();
    this.running = null;
    this.area = byId("columns");
    byId("form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.#clear());
    byId("colour").addEventListener("change", () => this.#colour());
    for (const radio of document.getElementsByName("mode")) radio.addEventListener("change", () => this.#switch());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !document.querySelector("dialog[open]")) this.run();
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
        unpoint();
        this.stop();
      }
    });
    this.#switch();
    this.#colour();
  }

  get chat() {
    return document.querySelector("input[name=mode]:checked").value === "chat";
  }

  has(name) {
    return this.columns.has(name);
  }

  /** Add or remove a column; false when there is no place for one more. */
  set(name, wanted) {
    if (wanted === this.has(name)) return true;
    if (wanted && this.columns.size >= MAX_COLUMNS) {
      this.#problem(`At most ${MAX_COLUMNS} columns at a time: take one away first.`);
      return false;
    }
    this.#problem("");
    if (wanted) {
      const column = new Column(name, () => this.set(name, false));
      this.columns.set(name, column);
      this.area.append(column.node);
    } else {
      this.columns.get(name).stop?.abort();
      this.columns.get(name).node.remove();
      this.columns.delete(name);
    }
    const names = [...this.columns.keys()].join(", ");
    byId("chosen").textContent = names ? `Comparing ${names}.` : "Nothing is chosen.";
    this.changed();
    return true;
  }

  /** Take away every column of a task that is no more. */
  forget(task) {
    for (const name of [...this.columns.keys()]) {
      if (name === task || name.startsWith(`${task}@`)) this.set(name, false);
    }
  }

  async run() {
    if (this.running || !byId("form").reportValidity()) return;
    const text = byId("prompt").value;
    if (!text.trim()) return this.#problem(this.chat ? "Write a message first." : "Write a prompt first.");
    if (this.columns.size === 0) return this.#problem("Choose at least one task in the list.");
    this.#problem("");
    unpoint();
    const body = { ...this.#sampling(), ...(this.chat ? {} : { prompt: text }) };
    const message = this.chat ? text : null;
    this.#busy(true);
    const system = byId("system").value.trim();
    const runs = [...this.columns.values()].map((column) => {
      column.stop = new AbortController();
      return column.run(body, message, system, column.stop.signal);
    });
    if (this.chat) byId("prompt").value = "";
    this.running = Promise.all(runs);
    await this.running;
    this.running = null;
    this.#busy(false);
  }

  stop() {
    if (!this.running) return;
    for (const column of this.columns.values()) column.stop?.abort();
  }

  #sampling() {
    const fields = {};
    for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
      const value = byId(name).value;
      if (value !== "") fields[name] = Number(value);
    }
    return fields;
  }

  #busy(running) {
    const [old, next] = running ? [byId("run"), byId("stop")] : [byId("stop"), byId("run")];
    const focused = document.activeElement === old;
    old.hidden = true;
    next.hidden = false;
    if (focused) next.focus();
    for (const radio of document.getElementsByName("mode")) radio.disabled = running;
  }

  #switch() {
    const chat = this.chat;
    byId("system-row").hidden = !chat;
    byId("clear").hidden = !chat;
    byId("prompt-label").textContent = chat ? "Message" : "Prompt";
    byId("run").textContent = chat ? "Send" : "Run";
    this.#clear();
  }

  #clear() {
    this.stop();
    for (const column of this.columns.values()) column.clear();
  }

  #colour() {
    this.area.classList.toggle("coloured", byId("colour").checked);
    byId("legend").hidden = !byId("colour").checked;
  }

  #problem(text) {
    show(byId("form-problem"), text);
  }
}
