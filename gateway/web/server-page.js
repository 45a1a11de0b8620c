// The page of one server: what it is, and its metrics with their latest values.

import { call, caller } from "./calls.js";
import { $, badge, element, fromTemplate, on, reconcile, ROWS_AT_ONCE, show, text } from "./elements.js";
import { fleet, HEADLINES, known } from "./fleet.js";
import { choose, drawAggregation, forgetHistory } from "./history.js";
import { pollServerAnew, pollSoon, tick } from "./polls.js";
import { drawFound } from "./server-findings.js";
import { lookAt, lookAway, server } from "./shown-server.js";
import { duration, fullStamp, now, quantity } from "./times-and-units.js";

const metricRows = new Map();

export function openServer(id, parameters) {
  lookAt(id, parameters);
  text($("server-title"), id);
  badge($("server-status"), fleet.get(id)?.status ?? "unknown");
  $("server-status").hidden = !fleet.has(id);
  $("server-maintenance").hidden = !fleet.get(id)?.inMaintenance;
  $("server-error").hidden = true;
  $("server-body").hidden = true;
  $("metric-filter").value = "";
  $("plot-controls").elements.range.value = server.range;
  forgetHistory(); // another server's curve is not his, also while his own is long in coming or there is none
  metricRows.forEach((row) => { row.shows = undefined; }); // a metric of the same name may have another unit here
  drawFound();
  document.title = `${id} – OpenManager`;
  show("server");
  pollServerAnew();
  tick();
}

function serverError(message) {
  text($("server-error"), message);
  $("server-error").hidden = !message;
}

export async function readServer() {
  const mine = server;
  try {
    const { value } = await call("server", { id: mine.id });
    if (server !== mine) return;
    mine.answer = known(value);
    serverError("");
  } catch (error) {
    if (server === mine) {
      serverError(error.status === 404 ? `There is no server ${mine.id}, or it is not yours to see.` : error.message);
      if (error.status === 404) {
        mine.answer = null;
        $("server-body").hidden = $("server-status").hidden = $("server-maintenance").hidden = true;
      }
    }
    return;
  }
  const names = Object.keys(mine.answer.metrics);
  if (!mine.metric) mine.metric = HEADLINES.find((name) => names.includes(name)) ?? names[0] ?? "";
  $("server-body").hidden = false;
  drawServer();
  tick(); // what waited for it
}

/** Units and kinds of its metrics. Without them the numbers stand alone. */
export async function readUnits() {
  const mine = server;
  let token = "";
  do {
    let answer;
    try {
      answer = (await call("metrics", { server_id: mine.id, page_size: "1000", page_token: token })).value;
    } catch {
      return;
    }
    for (const { key, unit, kind } of answer.metrics) {
      mine.units.set(key, { unit, counts: kind === "METRIC_KIND_COUNTER" });
    }
    token = answer.nextPageToken;
  } while (token && server === mine);
  if (server !== mine) return;
  metricRows.forEach((row) => { row.shows = undefined; });
  drawServer();
  if (mine.units.get(mine.metric)?.counts) pollSoon("history");
}

export async function readWindows() {
  const mine = server;
  if (caller.scope) return; // the call is for those who see all servers
  try {
    mine.windows = (await call("windows", { server_id: mine.id })).value.windows;
  } catch {
    return; // those that were known stand
  }
  if (server === mine) drawAbout();
}

export function drawServer() {
  const answer = server?.answer;
  if (!answer) return;
  $("server-status").hidden = false;
  badge($("server-status"), answer.status);
  $("server-maintenance").hidden = !answer.inMaintenance;
  drawAbout();
  drawFound();
  drawMetrics();
  drawAggregation();
}

export function drawAbout() {
  const answer = server?.answer;
  if (!answer) return;
  const window = (one) => {
    const from = `${fullStamp(Date.parse(one.startTime))} to ${fullStamp(Date.parse(one.endTime))}`;
    return [from + (one.reason && ":"), one.reason, one.createdBy && `(${one.createdBy})`].filter(Boolean).join(" ");
  };
  const skew = Number.parseFloat(answer.clockSkew ?? "0") * 1000;
  const about = [
    ["Host name", answer.hostname],
    ["Environment", answer.environment],
    ["Role", answer.role],
    ["Location", answer.location],
    ["Labels", Object.entries(answer.labels ?? {}).map(([key, value]) => `${key}: ${value}`).join("\n")],
    ["Measured", answer.observedTime ? fullStamp(answer.observed) : "never"],
    ["Age of data", answer.observedTime ? duration(Math.max(0, now() - answer.observed)) : ""],
    ["Its clock", Math.abs(skew) >= 1000 ? `${duration(Math.abs(skew))} ${skew > 0 ? "ahead" : "behind"}` : ""],
    ["Maintenance", server.windows.map(window).join("\n")],
    ["Notes", answer.notes ?? ""],
  ].filter(([, value]) => value);
  const list = $("about");
  const names = about.map(([name]) => name).join();
  if (list.dataset.names !== names) {
    list.dataset.names = names;
    list.replaceChildren(...about.flatMap(([name]) => [element("dt", "", name), element("dd")]));
  }
  about.forEach(([, value], at) => text(list.children[at * 2 + 1], value));
}

function drawMetrics() {
  const words = server.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const names = Object.keys(server.answer.metrics);
  const first = HEADLINES.filter((name) => names.includes(name));
  const all = [...first, ...names.filter((name) => !first.includes(name))];
  const unitOf = (key) => server.units.get(key)?.unit ?? "";
  const wanted = all.filter((key) => words.every((word) => `${key} ${unitOf(key)}`.toLowerCase().includes(word)));
  const drawn = wanted.slice(0, server.limit);
  const make = (key) => {
    const row = fromTemplate("metric-row");
    const button = row.firstElementChild.firstElementChild;
    text(button, key);
    button.dataset.metric = key;
    return { element: row, button, value: row.lastElementChild, shows: undefined };
  };
  reconcile($("metrics"), drawn, metricRows, (key) => key, make, (row, key) => {
    const value = server.answer.metrics[key];
    row.button.setAttribute("aria-pressed", String(key === server.metric));
    if (row.shows === value) return;
    row.shows = value;
    text(row.value, quantity(value, unitOf(key)));
  });
  text($("metrics-shown"), wanted.length < all.length ? `${wanted.length} of ${all.length}` : `${all.length}`);
  $("more-metrics").hidden = drawn.length === wanted.length;
}

export function forgetServer() {
  lookAway();
  metricRows.clear();
  for (const id of ["metrics", "about"]) $(id).replaceChildren();
  delete $("about").dataset.names;
  for (const id of ["server-title", "server-error"]) text($(id), "");
  drawFound();
  forgetHistory();
}

export function setUpServerPage() {
  on("metric-filters", "submit", (event) => event.preventDefault());
  on("metric-filter", "input", (event) => {
    server.filter = event.target.value;
    if (server.answer) drawMetrics();
  });
  on("more-metrics", "click", () => {
    server.limit += ROWS_AT_ONCE * 3;
    drawMetrics();
  });
  on("server-body", "click", (event) => {
    const button = event.target.closest("[data-metric]");
    if (!button) return;
    choose({ metric: button.dataset.metric, aggregation: "" });
    drawMetrics();
    drawAggregation();
    $("plot-title").scrollIntoView({ block: "nearest" });
  });
}
