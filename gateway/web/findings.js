// What is abnormal now: the findings that go on, as the stream tells them, and the part of the fleet's page that lists
// them.
//
// What must stay true: a finding is listed while it goes on and its server is in the fleet that the caller sees; that
// nothing is abnormal is said only by who would know.

import { call, caller, OTHER_CALLER } from "./calls.js";
import { $, fromTemplate, reconcile, ROWS_AT_ONCE, score, text } from "./elements.js";
import { lackOf, timed, whatOf, whoOf } from "./finding-words.js";
import { fleet } from "./fleet.js";
import { live } from "./live.js";
import { serverHash } from "./shown-server.js";
import { fullStamp, stamp, whole } from "./times-and-units.js";

const goingOn = new Map(); // id of a server -> id of a finding -> the finding
const findingRows = new Map();
let lacks = null; // what the list of findings told last of what it lacks; null: it was not asked yet
let failed = ""; // why it told nothing

export const isAbnormal = (serverId) => goingOn.has(serverId);

export function takeFinding(told) {
  const one = timed(told);
  const ofServer = goingOn.get(one.serverId) ?? new Map();
  if (one.endTime) ofServer.delete(one.id);
  else ofServer.set(one.id, one);
  if (ofServer.size) goingOn.set(one.serverId, ofServer);
  else goingOn.delete(one.serverId);
}

/** A snapshot tells all of them anew. */
export function clearFindings() {
  goingOn.clear();
}

/** The stream does not tell how much is learned, nor that nobody looks for findings. */
export async function readLacks() {
  try {
    lacks = (await call("findings", { open: "true", page_size: "1" })).value;
    failed = "";
  } catch (error) {
    if (!caller || error.reason === OTHER_CALLER) return; // whoever comes next is told nothing of it
    failed = `Whether more is abnormal is not known. ${error.message}`;
  }
  drawFindings();
}

export function drawFindings() {
  if ($("fleet").hidden && goingOn.size) return;
  const ofFleet = [...goingOn].filter(([serverId]) => fleet.has(serverId));
  const wanted = ofFleet.flatMap(([, ofServer]) => [...ofServer.values()]);
  wanted.sort((one, other) => other.from - one.from || (one.id < other.id ? -1 : 1));
  const drawn = wanted.slice(0, ROWS_AT_ONCE);
  reconcile($("findings"), drawn, findingRows, (one) => one.id, makeFindingRow, fillFindingRow);
  text($("findings-said"), summaryOf(wanted.length, ofFleet.length));
  $("findings-scroll").hidden = drawn.length === 0;
  $("more-findings").hidden = drawn.length === wanted.length;
  text($("more-findings"), `and ${whole.format(wanted.length - drawn.length)} more`);
}

function summaryOf(count, servers) {
  const some = (number, word) => `${whole.format(number)} ${word}${number === 1 ? "" : "s"}`;
  const lack = failed || (lacks ? lackOf(lacks) : "");
  if (count) return `${[some(count, "finding"), some(servers, "server")].join(" on ")}. ${lack}`.trim();
  if (live.state === "broken") return "Nothing was abnormal when the stream broke.";
  if (live.state === "connecting" || !lacks) return failed;
  return lack || "Nothing abnormal.";
}

function makeFindingRow(one) {
  const row = fromTemplate("finding-row");
  const [name, what, cell, since, who] = row.children;
  const link = name.firstElementChild;
  text(link, one.serverId);
  return { element: row, link, what, cell, since: since.firstElementChild, who };
}

function fillFindingRow(row, one) {
  const about = one.metric ? `?${new URLSearchParams({ metric: one.metric })}` : "";
  row.link.href = serverHash(one.serverId) + about;
  text(row.what, whatOf(one));
  score(row.cell, one.score);
  row.since.dateTime = one.startTime;
  row.since.title = fullStamp(one.from);
  text(row.since, stamp(one.from));
  text(row.who, whoOf(one));
}

export function forgetFindings() {
  goingOn.clear();
  lacks = null;
  failed = "";
  drawFindings();
}
