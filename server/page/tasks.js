// The list of tasks, a page at a time, and what can be done with each: compare, look back, roll back, delete.

import { access, mayChangeTasks } from "./access.js";
import { call, callJson } from "./api.js";
import { labelOf } from "./compare.js";
import { confirmed } from "./dialogs.js";
import { age, byId, bytes, counted, el, say, show } from "./dom.js";

const PAGE = 50;
const BASE = "base";

const quoted = (revision) => ({ "If-Match": `"${revision}"` });
const path = (task, rest = "") => `v1/tasks/${encodeURIComponent(task)}${rest}`;

/** The name after which all names that start with `prefix` come: the list's `after` is a name, not a prefix. */
function before(prefix) {
  return prefix && `${prefix.slice(0, -1)}${String.fromCharCode(prefix.charCodeAt(prefix.length - 1) - 1)}~`;
}

export class TaskList {
  constructor(compare) {
    this.compare = compare;
    this.list = byId("task-list");
    this.rows = new Map(); // task -> {info, node}
    this.turn = 0; // of reading the list; an older answer that comes late is dropped
    let typed = null;
    byId("find").addEventListener("input", () => {
      clearTimeout(typed);
      typed = setTimeout(() => this.load(), 150);
    });
    byId("more").addEventListener("click", () => this.#next());
  }

  get #prefix() {
    return byId("find").value.trim();
  }

  /** Read the list from its beginning. */
  async load() {
    this.list.setAttribute("aria-busy", "true");
    await this.#next(true);
    this.list.removeAttribute("aria-busy");
  }

  async #next(afresh = false) {
    const turn = (this.turn += 1);
    const prefix = this.#prefix;
    const last = afresh ? before(prefix) : [...this.rows.keys()].at(-1);
    try {
      const query = new URLSearchParams({ limit: PAGE, ...(last ? { after: last } : {}) });
      const answer = await callJson(`v1/tasks?${query}`);
      if (turn !== this.turn) return;
      show(byId("tasks-problem"), "");
      const found = answer.data.filter((info) => info.task.startsWith(prefix));
      if (afresh) this.#empty(prefix);
      for (const info of found) this.#append(info);
      byId("more").hidden = !answer.has_more || found.length < answer.data.length;
      if (this.list.childElementCount === 0) this.list.append(el("li.hint.nothing", {}, "No task has such a name."));
      this.#unusable(answer.unusable ?? []);
      if (afresh && prefix) say(answer.has_more ? `${found.length} or more tasks` : counted(found.length, "task"));
    } catch (error) {
      if (turn !== this.turn) return;
      if (afresh) this.#empty("");
      show(byId("tasks-problem"), error.message);
    }
  }

  #empty(prefix) {
    this.rows.clear();
    this.list.replaceChildren();
    if (BASE.startsWith(prefix)) this.list.append(this.#baseRow());
  }

  /** The key has other rights than before: rows that are open show what can be done now. */
  showAccess() {
    const base = this.list.querySelector(`[data-compare="${BASE}"]`);
    if (base) base.closest("li").hidden = !access.base;
    for (const { info, node } of this.rows.values()) {
      const panel = node.querySelector(".panel");
      if (panel.childElementCount) this.#fill(info, panel);
    }
  }

  #append(info) {
    const node = this.#row(info);
    this.list.append(node);
    this.rows.set(info.task, { info, node });
  }

  #unusable(rows) {
    const box = byId("unusable");
    box.hidden = rows.length === 0;
    const sets = rows.length === 1 ? "1 set in the store is" : `${rows.length} sets in the store are`;
    box.querySelector("summary").textContent = `${sets} not usable`;
    box.querySelector("ul").replaceChildren(
      ...rows.slice(0, 100).map(({ task, reason }) => el("li", {}, el("b", {}, task), ` ${reason}`)),
    );
  }

  /** A task is new or has changed: show it as it is now, in its place. */
  put(info) {
    const old = this.rows.get(info.task);
    const open = old?.node.querySelector("details")?.open;
    const node = this.#row(info, open);
    if (old) old.node.replaceWith(node);
    else {
      const next = [...this.rows.keys()].sort().find((task) => task > info.task);
      this.list.querySelector(".nothing")?.remove();
      this.list.insertBefore(node, next ? this.rows.get(next).node : null);
    }
    const rows = [...this.rows.entries(), [info.task, { info, node }]];
    this.rows = new Map(rows.sort(([a], [b]) => (a < b ? -1 : 1)));
  }

  /** The boxes say who is compared. */
  mark() {
    for (const box of this.list.querySelectorAll("[data-compare]")) {
      const on = this.compare.has(box.dataset.compare);
      if (box.type === "checkbox") box.checked = on;
      else box.setAttribute("aria-pressed", String(on));
    }
  }

  known(task) {
    return this.rows.get(task)?.info;
  }

  #box(name) {
    const box = el("input", { type: "checkbox", "data-compare": name, onchange: () => {
      if (!this.compare.set(name, box.checked)) box.checked = false;
    } });
    box.checked = this.compare.has(name);
    return box;
  }

  #baseRow() {
    const label = el("label.name", {}, this.#box(BASE), el("span", {}, BASE));
    return el("li.task", { hidden: !access.base }, label, el("p.about", {}, "The model without a task's scales"));
  }

  #row(info, open = false) {
    const status = info.status === "ready" ? null : el("span.badge.bad", { title: info.status_reason }, info.status);
    const label = el("label.name", {}, this.#box(info.task), el("span", {}, info.task));
    const about = el("p.about", {}, `${info.kind} · ${bytes(info.bytes)} · `, age(info.created), " · ", el("code", {}, info.revision.slice(0, 8)));
    const panel = el("div.panel");
    const more = el("details", { open }, el("summary", { "aria-label": `Details of ${info.task}` }, "Details"), panel);
    more.addEventListener("toggle", () => more.open && panel.childElementCount === 0 && this.#fill(info, panel));
    return el("li.task", { "data-task": info.task }, label, status, about, more);
  }

  async #fill(info, panel) {
    const problem = el("p.problem", { role: "alert", hidden: true });
    panel.replaceChildren(problem);
    const attempt = (work) => async () => {
      show(problem, "");
      try {
        await work();
      } catch (error) {
        show(problem, error.message);
      }
    };
    await attempt(async () => {
      const { data } = await callJson(path(info.task, "/revisions"));
      const history = el("ol.revisions", { "aria-label": `Revisions of ${info.task}, newest first` });
      history.append(...data.map((row) => this.#revision(info, row, attempt)));
      const button = (kind, text, work, off = false) =>
        el(`button.${kind}`, { type: "button", disabled: off, "aria-label": `${text}: ${info.task}`, onclick: attempt(work) }, text);
      const actions = [
        button("small", "Roll back", () => this.#rollBack(info), data.length < 2),
        button("small", "Download", () => this.#download(info)),
        button("small.danger", "Delete", () => this.#delete(info)),
      ];
      if (info.prompt_format) panel.append(el("p.format", {}, "Prompt format ", el("code", {}, info.prompt_format)));
      panel.append(el("h4", {}, "Revisions"), history);
      if (mayChangeTasks()) panel.append(el("div.actions", {}, ...actions));
    })();
  }

  #revision(info, row, attempt) {
    const name = labelOf(info.task, row.current ? null : row.revision);
    const compare = el("button.small", {
      type: "button", "data-compare": name, "aria-pressed": String(this.compare.has(name)), "aria-label": `Compare ${name}`,
      onclick: () => this.compare.set(name, !this.compare.has(name)),
    }, "Compare");
    const back = el("button.small", {
      type: "button", "aria-label": `Make ${row.revision.slice(0, 8)} current`,
      onclick: attempt(() => this.#rollBack(info, row.revision)),
    }, "Make current");
    const current = row.current && el("span.badge", {}, "current");
    return el(
      "li", {},
      el("code", { title: row.revision }, row.revision.slice(0, 12)), current,
      el("span.about", {}, age(row.created), ` · ${bytes(row.bytes)}`),
      el("span.tools", {}, compare, !row.current && mayChangeTasks() && back),
    );
  }

  async #rollBack(info, revision) {
    const where = revision ? `revision ${revision.slice(0, 12)}` : "the revision before this one";
    const text = `New requests to ${info.task} will run on ${where}. Running ones keep what they began with.`;
    if (!(await confirmed(`Roll ${info.task} back?`, text, "Roll back"))) return;
    const json = revision ? { revision } : {};
    const headers = quoted(info.revision);
    this.put(await callJson(path(info.task, "/rollback"), { method: "POST", json, headers }));
    this.#focus(info.task);
    say(`${info.task} was rolled back`);
  }

  async #delete(info) {
    const text = `All revisions of ${info.task} are removed. Requests that already run on it finish.`;
    if (!(await confirmed(`Delete ${info.task}?`, text, "Delete", true))) return;
    await call(path(info.task), { method: "DELETE", headers: quoted(info.revision) });
    this.rows.get(info.task)?.node.remove();
    this.rows.delete(info.task);
    this.compare.forget(info.task);
    byId("find").focus();
    say(`${info.task} was deleted`);
  }

  async #download(info) {
    const file = await (await call(path(info.task, "/content"))).blob();
    const link = el("a", { download: `${info.task}.safetensors` });
    link.href = URL.createObjectURL(file);
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  #focus(task) {
    this.rows.get(task)?.node.querySelector("summary").focus();
  }
}
