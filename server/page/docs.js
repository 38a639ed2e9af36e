// Swagger UI over this server's own /openapi.json. It is given the document, and asks no other host for anything.

import { callJson, key } from "./api.js";

const byId = (id) => document.getElementById(id);

/** The tab's key goes with what "Try it out" sends, unless another one was entered under "Authorize". */
function withKey(request) {
  const token = key.get();
  const own = new URL(request.url, document.baseURI).origin === location.origin;
  if (token && own && !request.headers.Authorization) request.headers.Authorization = `Bearer ${token}`;
  return request;
}

async function open() {
  try {
    const spec = await callJson("openapi.json", { quiet: true });
    spec.servers = [{ url: new URL(".", document.baseURI).href.replace(/\/$/, "") }];
    byId("problem").hidden = byId("key-form").hidden = true;
    window.SwaggerUIBundle({
      dom_id: "#docs",
      spec,
      requestInterceptor: withKey,
      showMutatedRequest: false, // the key stays out of the shown curl line
      validatorUrl: null,
      queryConfigEnabled: false,
      docExpansion: "list",
      defaultModelsExpandDepth: 0,
      tryItOutEnabled: true,
    });
  } catch (error) {
    byId("problem").textContent = error.message;
    byId("problem").hidden = false;
    byId("key-form").hidden = error.status !== 401;
    if (error.status === 401) byId("key").focus();
  }
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  open();
});
open();
