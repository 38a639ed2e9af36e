// What the server lets this page do: whether it asks for keys, and the role of the key that is in use.

import { callJson } from "./api.js";

const NOTHING = { keys: true, name: null, role: null, tasks: [], base: true };

/** As the server told it last; `role` is null while it asks for a key and has none that it knows. */
export let access = { ...NOTHING, keys: false };

/** Ask again; the page asks after each change of the key. */
export async function readAccess() {
  try {
    access = await callJson("v1/access", { quiet: true });
  } catch (error) {
    access = { ...NOTHING, keys: error.status === 401 };
  }
}

export const mayChangeTasks = () => access.role === "uploader" || access.role === "admin";
