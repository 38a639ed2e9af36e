// Puts the page together: what is served, its tasks, the comparison, its load.

import { access, mayChangeTasks, readAccess } from "./access.js";
import { callJson } from "./api.js";
import { Compare } from "./compare.js";
import { showKeyState, watchKey } from "./dialogs.js";
import { byId } from "./dom.js";
import { startGauges } from "./gauges.js";
import { TaskList } from "./tasks.js";
import { watchUploads } from "./uploads.js";

async function nameModel() {
  try {
    const facts = await callJson("version", { quiet: true });
    byId("model").textContent = facts.model ? [facts.model, facts.quantization, facts.device].filter(Boolean).join(" · ") : "loading …";
  } catch {
    byId("model").textContent = ""; // no key yet: the list asks for one, and this is read again
  }
}

const compare = new Compare(() => tasks.mark());
const tasks = new TaskList(compare);
const askNow = startGauges();

/** What the key may do is shown, and nothing else. */
async function showAccess() {
  await readAccess();
  showKeyState();
  byId("upload").hidden = !mayChangeTasks();
  if (!access.base) compare.set("base", false);
  tasks.showAccess();
  askNow();
  nameModel();
}

/** Everything that depends on the key. The list comes first: it asks for a key where one is missing. */
async function readAll() {
  await tasks.load();
  await showAccess();
}

byId("reload").addEventListener("click", readAll);
watchKey(readAll, showAccess);
watchUploads(tasks, (info) => tasks.put(info));
compare.set("base", true);
await readAll();
