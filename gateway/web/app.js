// The page: who is there, the fleet as it is now, one server and its history. This is its entry: it puts the parts
// together, and says what happens when.
//
// What must stay true: what comes from the API is only ever text (textContent), never markup; the page never claims to
// be live when it is not; a fleet of thousands is drawn a few times a second at most, and only as many rows as are
// asked for. What changes and is used by several parts lives in one of them, which alone assigns it; the imports make no
// circle; each part is served (SCRIPTS in __init__.py) and announced in index.html, so that all are fetched at once.

import { caller } from "./calls.js";
import { $, on } from "./elements.js";
import { drawFleet, fillAges, outdateRows, setUpFleetTable } from "./fleet-table.js";
import { drawFindings, readLacks } from "./findings.js";
import { drawHistory, readHistory, setUpHistory } from "./history.js";
import { live, liveState } from "./live.js";
import { pollSoon, setPolls, tick } from "./polls.js";
import { onHashChange } from "./routing.js";
import { drawFound, readFound } from "./server-findings.js";
import { drawAbout, drawServer, readServer, readUnits, readWindows, setUpServerPage } from "./server-page.js";
import { readCaller, setUpSession, start } from "./session.js";
import { drawStores, readStores } from "./stores.js";
import { closeStream, renewSilentStream, resumeStream } from "./stream.js";
import { readSummary } from "./summary.js";
import { inUtc, showTimesInUtc } from "./times-and-units.js";

const HIDDEN_MS = 60_000; // a tab nobody looks at gives its connection back; a browser has six for all tabs together

function everySecond() {
  tick();
  if (!caller || document.hidden) return;
  if (!$("fleet").hidden) {
    fillAges();
    drawFindings();
  }
  if (!$("server").hidden) {
    drawAbout();
    drawFound();
  }
  renewSilentStream();
}

let hiding = 0;

function onVisibility() {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(closeStream, HIDDEN_MS);
  else if (caller) {
    pollSoon("caller", 0);
    resumeStream();
    tick();
  }
}

function chooseZone(zone) {
  showTimesInUtc(zone !== "local");
  $("zone").value = inUtc ? "utc" : "local";
  outdateRows();
  if (!caller) return;
  if (live.state === "broken") liveState("broken");
  drawStores();
  drawFleet();
  drawServer();
  drawHistory();
}

function remembered(value) {
  try {
    if (value) localStorage.setItem("zone", value);
    return localStorage.getItem("zone");
  } catch {
    return value; // a browser may forbid it
  }
}

function listen() {
  on("skip", "click", (event) => {
    event.preventDefault(); // the address says which page is shown
    $("main").focus();
  });
  on("zone", "change", (event) => chooseZone(remembered(event.target.value) ?? "utc"));
  window.addEventListener("hashchange", onHashChange);
  document.addEventListener("visibilitychange", onVisibility);
  window.addEventListener("pagehide", closeStream);
  window.addEventListener("pageshow", (event) => event.persisted && onVisibility());
  setInterval(everySecond, 1000);
}

setPolls([
  { name: "caller", task: readCaller, everyS: 15 },
  { name: "summary", task: readSummary, everyS: 5 },
  { name: "stores", task: readStores, everyS: 10 },
  { name: "lacks", task: readLacks, everyS: 30 },
  { name: "server", task: readServer, everyS: 15, ofServer: true },
  { name: "history", task: readHistory, everyS: 10, ofServer: true, whenFound: true },
  { name: "found", task: readFound, everyS: 60, ofServer: true, whenFound: true },
  { name: "units", task: readUnits, everyS: 600, ofServer: true, whenFound: true },
  { name: "windows", task: readWindows, everyS: 60, ofServer: true, whenFound: true },
]);
setUpSession();
setUpFleetTable();
setUpServerPage();
setUpHistory();
listen();
chooseZone(remembered() ?? "utc");
start();
