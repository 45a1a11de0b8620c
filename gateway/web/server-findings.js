// The findings of the server that is shown: when it was not as usual, by which metrics, and what people say of it.
//
// What must stay true: what somebody is writing, and where he is, stays when the list is drawn anew; who may not judge
// has no buttons.

import { call, caller } from "./calls.js";
import { $, element, fromTemplate, reconcile, ROWS_AT_ONCE, score, text } from "./elements.js";
import {
  goesOn, isForeseen, isSilence, lackOf, remarksOf, timed, valueOf, whatOf, whenOf, whoOf,
} from "./finding-words.js";
import { drawHistory } from "./history.js";
import { findingDays, judgedUnit, server, shaded } from "./shown-server.js";
import { fullStamp, inUtc, whole } from "./times-and-units.js";

const JUDGES = ["ROLE_OPERATOR", "ROLE_ADMIN"];

const foundRows = new Map();

export async function readFound() {
  const mine = server;
  const days = findingDays();
  const asked = { server_id: mine.id, start_time: `-${days}d`, page_size: String(ROWS_AT_ONCE) };
  try {
    const { value } = await call("findings", asked);
    if (server !== mine) return;
    foundIs({ ...value, days, anomalies: value.anomalies.map(timed) });
    mine.foundError = "";
  } catch (error) {
    if (server !== mine) return;
    mine.foundError = error.message;
  }
  drawFound();
}

function foundIs(found) {
  const before = String(shaded());
  server.found = found;
  if (String(shaded()) !== before) drawHistory();
}

export function drawFound() {
  const found = server?.found;
  const days = found?.days ?? 7;
  const items = found?.anomalies ?? [];
  reconcile($("found"), items, foundRows, (one) => one.id, makeFound, fillFound);
  text($("found-title"), `Findings of the last ${days} days`);
  text($("found-error"), server?.foundError ?? "");
  $("found-error").hidden = !server?.foundError;
  const none = found && !items.length ? `Nothing abnormal in the last ${days} days.` : "";
  text($("found-said"), found ? [none, lackOf(found)].filter(Boolean).join(" ") : "");
  const more = found ? found.totalSize - items.length : 0;
  $("more-found").hidden = more <= 0;
  text($("more-found"), `and ${whole.format(more)} more`);
}

function makeFound() {
  const item = fromTemplate("found-row");
  const part = (name) => item.querySelector(`.${name}`);
  const row = {
    element: item, details: item.firstElementChild, state: part("badge"), what: part("what"), score: part("gauge"),
    when: part("when"), who: part("who"), usual: part("usual"), table: part("parts"), remarks: part("remarks"),
    form: part("judge"), comment: item.querySelector("input"), error: part("error"), done: part("done"),
    partRows: new Map(), one: null, shows: "", busy: false,
  };
  row.details.addEventListener("toggle", () => fillBody(row));
  row.form.hidden = !JUDGES.includes(caller.role);
  row.form.addEventListener("submit", (event) => event.preventDefault()); // Enter says none of the three
  row.form.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button) say(row, button.dataset.say);
  });
  return row;
}

function fillFound(row, one) {
  row.one = one;
  text(row.what, whatOf(one)); // of a server that is silent it changes by the second
  const shows = [one.updateTime, inUtc, server.units.size].join();
  if (row.shows === shows) return;
  row.shows = shows;
  row.state.className = goesOn(one) ? "badge warning" : "badge over";
  text(row.state, goesOn(one) ? "goes on" : "over");
  score(row.score, one.score);
  text(row.when, whenOf(one));
  text(row.who, `taken care of by ${whoOf(one)}`);
  fillBody(row);
}

/** What is seen of a finding that is opened. */
function fillBody({ one, details, usual, table, partRows, remarks }) {
  if (!details.open) return;
  const at = fullStamp(Date.parse(one.peakTime));
  const peak = isForeseen(one) ? `Likeliest to fail within hours at ${at}.` : `Furthest from usual at ${at}.`;
  const silence = `Usual is up to ${valueOf(one.expectedHigh, "s")} between two messages.`;
  text(usual, isSilence(one) ? silence : peak);
  const wanted = one.contributions.length || !one.metric ? one.contributions : [one];
  table.hidden = !wanted.length;
  reconcile(table.tBodies[0], wanted, partRows, (part) => part.metric, makePart, fillPart);
  const said = remarksOf(one);
  remarks.replaceChildren(...(said.length ? said : ["Nobody has said anything of it yet."]).map(remarkItem));
}

const remarkItem = (words) => element("li", "", words);

function makePart(part) {
  const row = fromTemplate("part-row");
  const button = row.firstElementChild.firstElementChild;
  text(button, part.metric);
  button.dataset.metric = part.metric;
  return { element: row };
}

function fillPart({ element: row }, part) {
  const [, value, expected, far] = row.children;
  const unit = judgedUnit(part.metric);
  text(value, valueOf(part.value, unit));
  text(expected, `${valueOf(part.expectedLow, unit)} to ${valueOf(part.expectedHigh, unit)}`);
  score(far, part.score);
}

/** Tells the gateway what the caller says: `care`, that he takes care of it; `real` or `false`, what it was. */
async function say(row, what) {
  if (row.busy) return;
  row.busy = true;
  row.form.setAttribute("aria-busy", "true");
  answered(row, "", ""); // so that what is answered again is read out again
  const mine = server;
  const { id } = row.one;
  const body = { comment: row.comment.value };
  try {
    const judged = { ...body, verdict: what };
    const one = await (what === "care" ? call("acknowledge", { id }, body) : call("feedback", { id }, judged));
    row.comment.value = "";
    answered(row, "It is recorded.", "");
    if (server === mine) itIs(timed(one.value));
  } catch (error) {
    answered(row, "", error.message);
  } finally {
    row.busy = false;
    row.form.removeAttribute("aria-busy");
  }
}

function answered(row, done, error) {
  text(row.done, done);
  text(row.error, error);
  row.error.hidden = !error;
}

/** A finding of the list as it is now. */
function itIs(one) {
  foundIs({ ...server.found, anomalies: server.found.anomalies.map((each) => (each.id === one.id ? one : each)) });
  drawFound();
}
