// The live stream: opened, listened to, and opened anew when it breaks.

import { address, call, caller, sentence } from "./calls.js";
import { clearFindings, takeFinding } from "./findings.js";
import { fleet, known } from "./fleet.js";
import { holdRedraw, redrawSoon } from "./fleet-table.js";
import { live, liveState, newsCame } from "./live.js";
import { pollSoon } from "./polls.js";
import { server } from "./shown-server.js";

const SILENCE_MS = 60_000; // without any event the stream is opened anew: a dead connection may look like a quiet fleet

let stream = null; // the EventSource that is open
let version = ""; // of the newest event
let quietSince = 0;
let backoffS = 0;
let timer = 0;

export function openStream() {
  closeStream();
  if (live.state !== "broken") liveState("connecting");
  const source = new EventSource(address("watch", { after_version: version }).url);
  stream = source;
  quietSince = Date.now();
  const heard = () => {
    quietSince = Date.now();
    backoffS = 0;
    if (live.state !== "live") liveState("live");
  };
  source.addEventListener("open", () => {
    heard();
    pollSoon("caller", 0); // a browser that reconnects shows the cookie that it has now
  });
  for (const [name, take] of Object.entries(EVENTS)) {
    source.addEventListener(name, (event) => {
      version = event.lastEventId || version;
      newsCame();
      heard();
      take(JSON.parse(event.data));
      redrawSoon();
    });
  }
  source.addEventListener("error", (event) => {
    if (source !== stream) return;
    liveState("broken", event.data ? sentence(JSON.parse(event.data).message) : "");
    if (source.readyState === EventSource.CLOSED) reopenLater(); // otherwise the browser tries again by itself
  });
}

const EVENTS = {
  snapshot() {
    fleet.clear();
    clearFindings();
    holdRedraw(); // until most of it is there
  },
  server(one) {
    const before = fleet.get(one.id);
    const after = known(one);
    fleet.set(one.id, after);
    if (!before || before.category !== after.category) pollSoon("summary");
    if (server?.id === one.id) pollSoon("server");
  },
  removed({ id }) {
    fleet.delete(id);
    pollSoon("summary");
    if (server?.id === id) pollSoon("server");
  },
  anomaly(one) {
    takeFinding(one);
    if (server?.id === one.serverId) pollSoon("found");
  },
};

export function closeStream() {
  clearTimeout(timer);
  stream?.close();
  stream = null;
}

export function reopenLater() {
  closeStream();
  backoffS = Math.min(30, backoffS * 2 || 2);
  timer = setTimeout(async () => {
    try {
      await call("whoAmI"); // the stream itself does not tell why it is refused; a session that is over ends here
    } catch (error) {
      if (caller) {
        liveState("broken", error.message);
        reopenLater();
      }
      return;
    }
    if (caller) openStream();
  }, backoffS * 1000);
}

/** It was closed while nobody looked. */
export function resumeStream() {
  if (!stream) openStream();
}

export function renewSilentStream() {
  if (stream && Math.abs(Date.now() - quietSince) > SILENCE_MS) openStream(); // or the clock was set back
}

export function forgetStream() {
  closeStream();
  version = "";
}
