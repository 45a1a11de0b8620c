// The table of all servers: filtered, sorted, and drawn again when something changed.

import { caller } from "./calls.js";
import { $, badge, fromTemplate, on, reconcile, ROWS_AT_ONCE, text } from "./elements.js";
import { drawFindings, isAbnormal } from "./findings.js";
import { fleet, HEADLINES, SEVERITY, THRESHOLDS } from "./fleet.js";
import { live } from "./live.js";
import { serverHash } from "./shown-server.js";
import { duration, fullStamp, now, whole } from "./times-and-units.js";

const MOST_ROWS = 1_000; // as many take 0.1 s to draw anew; who has more servers filters
const REDRAW_MS = 250;

const serverRows = new Map();
const view = { words: [], status: "", sort: "status", down: false, limit: ROWS_AT_ONCE };
let redrawn = 0;
let redrawing = false;
let holdUntil = 0;

/** Draws nothing for a moment. */
export function holdRedraw() {
  holdUntil = performance.now() + REDRAW_MS;
}

export function redrawSoon() {
  if (redrawing) return;
  redrawing = true;
  const wait = Math.max(0, redrawn + REDRAW_MS - performance.now(), holdUntil - performance.now());
  setTimeout(() => requestAnimationFrame(drawFleet), wait);
}

const SORT_VALUES = {
  status: (one) => SEVERITY[one.category] ?? 9,
  id: (one) => one.order,
  environment: (one) => one.environment,
  role: (one) => one.role,
  age: (one) => -one.observed,
};

function chosen() {
  const wanted = [...fleet.values()].filter(
    (one) =>
      (!view.status || one.category === view.status) && view.words.every((word) => one.haystack.includes(word)),
  );
  const value = SORT_VALUES[view.sort] ?? ((one) => one.metrics[view.sort] ?? NaN);
  const sign = view.down ? -1 : 1;
  const keys = new Map(wanted.map((one) => [one, value(one)]));
  return wanted.sort((one, other) => {
    const a = keys.get(one);
    const b = keys.get(other);
    if (a !== b) {
      if (a !== a || b !== b) return (a !== a) - (b !== b) || (one.order < other.order ? -1 : 1); // NaN: comes last
      return a < b ? -sign : sign;
    }
    return one.order < other.order ? -1 : 1;
  });
}

export function drawFleet() {
  redrawing = false;
  redrawn = performance.now();
  if ($("fleet").hidden && fleet.size) return;
  const wanted = chosen();
  const drawn = wanted.slice(0, view.limit);
  drawFindings();
  reconcile($("servers"), drawn, serverRows, (one) => one.id, makeServerRow, fillServerRow);
  const all = `${whole.format(fleet.size)} ${fleet.size === 1 ? "server" : "servers"}`;
  const some = drawn.length < wanted.length ? `first ${whole.format(drawn.length)} of ` : "";
  text($("shown"), `${some}${wanted.length < fleet.size ? `${whole.format(wanted.length)} of ${all}` : all}`);
  $("more-servers").hidden = drawn.length === wanted.length || drawn.length >= MOST_ROWS;
  $("no-servers").hidden = wanted.length > 0 || live.state === "connecting" || !caller;
  const none = "There is no server yet. One appears when it first reports.";
  text($("no-servers"), fleet.size ? "No server matches the filter." : none);
}

function makeServerRow(one) {
  const row = fromTemplate("server-row");
  const [state, name, environment, role, ...rest] = row.children;
  const age = rest.pop().firstElementChild;
  name.firstElementChild.href = serverHash(one.id);
  text(name.firstElementChild, one.id);
  const gauges = rest.map((cell) => [cell.firstElementChild, cell.lastElementChild.firstElementChild]);
  const [, mark, abnormal, host] = name.children;
  const cells = { badge: state.firstElementChild, mark, abnormal, host, environment, role, gauges, age };
  return { element: row, ...cells, shows: null };
}

function fillServerRow(row, one) {
  row.abnormal.hidden = !isAbnormal(one.id);
  if (row.shows === one) return;
  row.shows = one;
  row.element.className = one.status === "offline" ? "old" : "";
  badge(row.badge, one.status);
  row.mark.hidden = !one.inMaintenance;
  text(row.host, one.hostname === one.id ? "" : one.hostname);
  text(row.environment, one.environment);
  text(row.role, one.role);
  HEADLINES.forEach((metric, at) => {
    const [value, bar] = row.gauges[at];
    const percent = one.metrics[metric];
    const has = typeof percent === "number";
    const [warning, critical] = THRESHOLDS[metric];
    text(value, has ? `${percent.toFixed(1)} %` : "–");
    value.className = has ? "value" : "value none";
    bar.style.width = has ? `${Math.min(100, Math.max(0, percent))}%` : "0";
    bar.className = !has || percent < warning ? "" : percent < critical ? "warning" : "critical";
  });
  row.age.dateTime = one.observedTime ?? "";
  row.age.title = one.observedTime ? fullStamp(one.observed) : "";
  fillAge(row);
}

function fillAge(row) {
  const { observed } = row.shows;
  text(row.age, Number.isNaN(observed) ? "never" : duration(Math.max(0, now() - observed)));
}

export function fillAges() {
  serverRows.forEach(fillAge);
}

/** No row is right any more: each is filled when it is drawn next. */
export function outdateRows() {
  serverRows.forEach((row) => { row.shows = null; });
}

function chooseStatus(status) {
  view.status = status;
  view.limit = ROWS_AT_ONCE;
  $("status").value = status;
  for (const tile of $("tiles").children) tile.setAttribute("aria-pressed", String(tile.dataset.status === status));
  drawFleet();
}

function sortBy(column) {
  const worstFirst = HEADLINES.includes(column); // the fullest are looked for, not the emptiest
  view.down = view.sort === column ? !view.down : worstFirst;
  view.sort = column;
  drawSorting();
  drawFleet();
}

function drawSorting() {
  for (const heading of $("columns").children) {
    if (heading.dataset.sort === view.sort) heading.setAttribute("aria-sort", view.down ? "descending" : "ascending");
    else heading.removeAttribute("aria-sort");
  }
}

export function forgetFleet() {
  fleet.clear();
  view.words = [];
  $("filters").reset();
  chooseStatus("");
}

export function setUpFleetTable() {
  on("filters", "submit", (event) => event.preventDefault());
  on("filter", "input", (event) => {
    view.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    view.limit = ROWS_AT_ONCE;
    drawFleet();
  });
  on("status", "change", (event) => chooseStatus(event.target.value));
  on("tiles", "click", (event) => {
    const tile = event.target.closest("button");
    if (tile) chooseStatus(tile.dataset.status === view.status ? "" : tile.dataset.status);
  });
  on("columns", "click", (event) => {
    const heading = event.target.closest("button")?.parentElement;
    if (heading) sortBy(heading.dataset.sort);
  });
  on("more-servers", "click", () => {
    view.limit = Math.min(MOST_ROWS, view.limit + ROWS_AT_ONCE * 2);
    drawFleet();
  });
  drawSorting();
}
