// Files to tasks: dropped or chosen, named, sent one after the other, each with its progress and its end.

import { mayChangeTasks } from "./access.js";
import { upload } from "./api.js";
import { byId, bytes, el, say } from "./dom.js";

/** A task's name from a file's: what no name may have becomes "-". */
export function nameOf(file) {
  const stem = file.name.toLowerCase().replace(/\.safetensors$/, "");
  return stem.replace(/[^a-z0-9._-]+/g, "-").replace(/^[^a-z0-9]+/, "").slice(0, 64);
}

/** `uploaded(info)` is called with each task that the server took. */
export function watchUploads(tasks, uploaded) {
  const drop = byId("drop");
  const files = byId("files");
  const take = (list) => {
    const rows = [...list].map((file) => row(file, tasks, uploaded));
    byId("uploads").prepend(...rows);
    rows[0]?.querySelector("input").focus();
  };
  byId("choose").addEventListener("click", () => files.click());
  files.addEventListener("change", () => {
    take(files.files);
    files.value = "";
  });
  // Everywhere, not on the box alone: a file that misses it would replace the page.
  for (const kind of ["dragover", "drop"]) {
    document.addEventListener(kind, (event) => event.dataTransfer?.types.includes("Files") && event.preventDefault());
  }
  document.addEventListener("dragover", () => drop.classList.add("over"));
  document.addEventListener("dragleave", (event) => event.relatedTarget === null && drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    drop.classList.remove("over");
    if (event.dataTransfer?.files.length && mayChangeTasks()) take(event.dataTransfer.files);
  });
}

function row(file, tasks, uploaded) {
  const name = el("input", {
    type: "text", value: nameOf(file), required: true, maxlength: 64, spellcheck: false, autocapitalize: "off",
    pattern: "[a-z0-9][a-z0-9._\\-]*", title: "a-z, 0-9, '.', '_' and '-', beginning with a letter or a digit",
    "aria-label": `Name of the task for ${file.name}`,
  });
  const bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": `Upload of ${file.name}` });
  const state = el("p.about", {}, `${file.name} · ${bytes(file.size)}`);
  const send = el("button.primary.small", {}, "Upload");
  const cross = el("button.quiet.remove", { type: "button", "aria-label": `Take ${file.name} away`, title: "Take away" }, "×");
  const form = el("form", {}, name, send, cross);
  const node = el("li", {}, form, bar, state);
  const hint = () => {
    const old = tasks.known(name.value);
    send.textContent = old ? "Replace" : "Upload";
  };
  const tell = (kind, text) => {
    node.dataset.state = kind;
    state.textContent = text;
    state.setAttribute("role", kind === "failed" ? "alert" : "status");
  };
  name.addEventListener("input", hint);
  cross.addEventListener("click", () => {
    node.remove();
    byId("choose").focus();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    send.disabled = name.disabled = cross.disabled = true;
    bar.hidden = false;
    tell("busy", `Sending ${bytes(file.size)} …`);
    try {
      const info = await upload(name.value, file, (share) => {
        bar.value = share;
        if (share === 1) tell("busy", "Being checked by the server …");
      });
      tell("done", `${info.task} is live: revision ${info.revision.slice(0, 12)}`);
      form.hidden = true;
      say(`${info.task} is live`);
      uploaded(info);
    } catch (error) {
      tell("failed", error.message);
      send.disabled = name.disabled = false;
      name.focus();
    }
    cross.disabled = false;
    bar.hidden = true;
  });
  hint();
  return node;
}
