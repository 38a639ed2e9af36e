// The two questions that this page asks: for a key, and whether something is really meant.

import { access } from "./access.js";
import { key, onUnauthorized } from "./api.js";
import { byId, show } from "./dom.js";

/** Open a dialog; resolves to the value of the button that closed it ("" for Escape). */
function answered(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

let asking = null;

/** Ask for the key, once for all calls that wait for it; true when one was given. `problem`: why it is asked. */
export function askKey(problem) {
  asking ??= (async () => {
    show(byId("key-problem"), problem);
    byId("key").value = "";
    byId("key-forget").hidden = !key.get();
    const answer = await answered(byId("key-dialog"));
    const given = byId("key").value.trim();
    byId("key").value = "";
    if (answer === "use" && given) key.set(given);
    if (answer === "forget") key.set(null);
    showKeyState();
    byId("key-button").hidden = false; // asked for: the server wants one, or one is in use
    return answer === "use" && Boolean(given);
  })().finally(() => {
    asking = null;
  });
  return asking;
}

/** The button that asks for a key: there is none where the server wants none. */
export function showKeyState() {
  const button = byId("key-button");
  button.hidden = !(access.keys || key.get());
  button.textContent = key.get() ? "Key in use" : "Enter a key";
  button.title = access.name === null ? "" : `${access.name}, ${access.role}`;
}

/**
 * The button in the page's head, and the question on a 401. `changed()` runs after the button brought a change,
 * `accepted()` after the server took a key that was asked for.
 */
export function watchKey(changed, accepted) {
  onUnauthorized(askKey, accepted);
  byId("key-button").addEventListener("click", async () => {
    const before = key.get();
    await askKey(null);
    if (key.get() !== before) changed();
  });
  showKeyState();
}

/** "Really?": resolves to true or false. `danger` paints the button red. */
export async function confirmed(title, text, button, danger = false) {
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = button;
  byId("confirm-yes").className = danger ? "danger" : "primary";
  return (await answered(byId("confirm"))) === "yes";
}
