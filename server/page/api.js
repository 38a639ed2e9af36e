// Calls to this server: its key, its error sentences, streamed answers, uploads with progress.

const KEY = "peqa.key";

/** A refusal, or a call that did not get through; `message` is a sentence for people. */
export class Problem extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The key of this tab: in sessionStorage alone, and in the Authorization header alone. */
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

let askForKey = async () => false;
let tellOfKey = () => {};

/**
 * `ask(sentence)` is called on a 401; it resolves to true when there is another key to try. `accepted()` is called when
 * the server has taken that one.
 */
export function onUnauthorized(ask, accepted) {
  askForKey = ask;
  tellOfKey = accepted;
}

const address = (path) => new URL(path, document.baseURI).href;

function headersWith(token, more = {}) {
  return token ? { ...more, Authorization: `Bearer ${token}` } : more;
}

function problemOf(status, text) {
  try {
    const { error } = JSON.parse(text);
    if (typeof error.message === "string") return new Problem(status, error.message, error.code);
  } catch {
    // not of this server's shape: something between it and this page answered
  }
  return new Problem(status, `the server answered with status ${status}`);
}

/** Repeat `attempt(token)` while it meets a 401 and there is another key to try. */
async function withKey(attempt, quiet) {
  for (let asked = false; ; ) {
    const token = key.get();
    try {
      const answer = await attempt(token);
      if (asked) tellOfKey();
      return answer;
    } catch (error) {
      if (!(error instanceof Problem) || error.status !== 401 || quiet) {
        if (asked) tellOfKey(); // the key is known, whatever else is wrong
        throw error;
      }
      if (key.get() !== token) continue; // another call has asked
      if (!(await askForKey(token ? error.message : null))) throw error;
      asked = true;
    }
  }
}

/**
 * Fetch `path`, which is relative to the page. `quiet`: a 401 is thrown like any other refusal, nobody is asked.
 * `sending` is called right before each try.
 * Throws `Problem`; an abort by `signal` is thrown as fetch's own AbortError.
 */
export function call(path, { method = "GET", json, headers = {}, signal, quiet = false, sending = () => {} } = {}) {
  return withKey(async (token) => {
    const own = json === undefined ? {} : { "Content-Type": "application/json" };
    let response;
    sending();
    try {
      response = await fetch(address(path), {
        method,
        headers: headersWith(token, { ...own, ...headers }),
        body: json === undefined ? undefined : JSON.stringify(json),
        signal,
        cache: "no-store",
        credentials: "omit",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Problem(0, "the server cannot be reached");
    }
    if (!response.ok) throw problemOf(response.status, await response.text());
    return response;
  }, quiet);
}

export async function callJson(path, options) {
  return (await call(path, options)).json();
}

const cutShort = () => new Problem(0, "the connection ended before the answer did");

/** The objects of a stream of server-sent events, up to its [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : cutShort();
    });
    if (done) throw cutShort();
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data:")) continue;
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

/** PUT a file as a task; `progress(share)` goes from 0 to 1. (fetch does not tell how much was sent.) */
export function upload(task, file, progress) {
  const attempt = (token) =>
    new Promise((resolve, reject) => {
      const sending = new XMLHttpRequest();
      sending.open("PUT", address(`v1/tasks/${encodeURIComponent(task)}`));
      for (const [name, value] of Object.entries(headersWith(token))) sending.setRequestHeader(name, value);
      sending.upload.onprogress = (event) => event.lengthComputable && progress(event.loaded / event.total);
      sending.onerror = () => reject(new Problem(0, "the connection was lost during the upload"));
      sending.onload = () => {
        if (sending.status === 200) resolve(JSON.parse(sending.responseText));
        else reject(problemOf(sending.status, sending.responseText));
      };
      sending.send(file);
    });
  return withKey(attempt, false);
}
