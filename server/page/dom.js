// Elements from data. Whatever comes from the server becomes a text node or an attribute's value, never markup.

/** `el("li.row", {onclick, "aria-label": "…"}, child, "text")`; children that are null or false are left out. */
export function el(kind, attributes = {}, ...children) {
  const [tag, ...classes] = kind.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child != null && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** Show `text` in an element that is hidden while it has none. */
export function show(node, text) {
  node.textContent = text ?? "";
  node.hidden = !text;
}

/** Tell people who hear the page; nothing changes for those who see it. */
export function say(text) {
  byId("said").textContent = text;
}

/** "1 token", "2 tokens". */
export const counted = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

export function bytes(count) {
  const units = ["B", "kB", "MB", "GB"];
  let unit = 0;
  for (; count >= 1000 && unit < units.length - 1; unit += 1) count /= 1000;
  return `${count >= 100 || unit === 0 ? Math.round(count) : count.toFixed(1)} ${units[unit]}`;
}

const STEPS = [[60, "second"], [3600, "minute"], [86400, "hour"], [Infinity, "day"]];
const SECONDS = { second: 1, minute: 60, hour: 3600, day: 86400 };

/** `<time>` that says how long ago `seconds` (since 1970) was, and when in its title. */
export function age(seconds) {
  const past = Math.max(0, Date.now() / 1000 - seconds);
  const unit = STEPS.find(([limit]) => past < limit)[1];
  const words = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
  const moment = new Date(seconds * 1000);
  const attributes = { datetime: moment.toISOString(), title: moment.toLocaleString() };
  return el("time", attributes, words.format(-Math.floor(past / SECONDS[unit]), unit));
}
