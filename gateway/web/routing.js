// Which page the address names.

import { caller } from "./calls.js";
import { $, show } from "./elements.js";
import { drawFleet } from "./fleet-table.js";
import { pollSoon } from "./polls.js";
import { openServer } from "./server-page.js";
import { lookAway, server } from "./shown-server.js";

export function route() {
  if (!caller) return;
  const [path, query] = location.hash.slice(1).split("?");
  const match = /^\/servers\/([^/]+)$/.exec(path);
  if (match) {
    let id = match[1];
    try {
      id = decodeURIComponent(id);
    } catch {
      // as it stands: nothing has such an id, and the page says so
    }
    openServer(id, new URLSearchParams(query));
    return;
  }
  lookAway();
  document.title = "OpenManager";
  show("fleet");
  drawFleet();
  pollSoon("summary", 0);
}

export function onHashChange() {
  if (!caller) return;
  route();
  window.scrollTo(0, 0);
  $(server ? "server-title" : "fleet-title").focus({ preventScroll: true });
}
