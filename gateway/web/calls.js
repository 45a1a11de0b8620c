// The calls of the gateway, and for whom they are made. All that the page asks for is asked here, or at an address from
// here; but whether there is an OpenID provider, which is no call.

import { compareClocks } from "./times-and-units.js";

// tests/web holds each line to the gateway's routes: verb, path and names of parameters.
const CALLS = {
  whoAmI: "GET /v1/session",
  logIn: "POST /v1/session",
  logOut: "DELETE /v1/session",
  summary: "GET /v1/fleet/summary",
  watch: "GET /v1/fleet/watch?after_version",
  stores: "GET /v1/storage/status",
  server: "GET /v1/servers/{id}",
  windows: "GET /v1/servers/{server_id}/maintenance",
  metrics: "GET /v1/metrics?server_id&page_size&page_token",
  findings: "GET /v1/anomalies?server_id&start_time&open&page_size",
  acknowledge: "POST /v1/anomalies/{id}:acknowledge",
  feedback: "POST /v1/anomalies/{id}:feedback",
  history: "GET /v1/servers/{server_id}/history?metric&start_time&end_time&step&aggregation",
};

const ANSWER_WITHIN_MS = 12_000; // the gateway itself gives up after 10 s, and says so

class Refused extends Error {
  constructor(status, message, reason = "", retryAfterS = 0) {
    super(message);
    Object.assign(this, { status, reason, retryAfterS });
  }
}

export const OTHER_CALLER = "OTHER_CALLER";
export let caller = null; // the answer of whoAmI or logIn; null: nobody is logged in
let sessionEnded = () => {};

export function callerIs(answer) {
  caller = answer;
}

/** What is done when the gateway says that the session of the caller is over. */
export function whenSessionEnds(act) {
  sessionEnded = act;
}

export function address(name, values = {}) {
  const [verb, target] = CALLS[name].split(" ");
  const [template, names = ""] = target.split("?");
  const path = template.replace(/\{(\w+)\}/g, (_, field) => encodeURIComponent(values[field]));
  const query = new URLSearchParams();
  for (const each of names.split("&")) if (values[each]) query.set(each, values[each]);
  return { verb, url: String(query) ? `${path}?${query}` : path };
}

/** Asks the gateway; the answer's JSON. Throws Refused, with status 0 when there is no answer. */
export async function call(name, values, body) {
  const { verb, url } = address(name, values);
  const headers = { accept: "application/json" };
  if (body) headers["content-type"] = "application/json";
  if (verb !== "GET" && caller?.csrfToken) headers["x-csrf-token"] = caller.csrfToken;
  const asked = Date.now();
  const asker = caller;
  let answer;
  let value = null;
  try {
    const signal = AbortSignal.timeout(ANSWER_WITHIN_MS);
    const request = { method: verb, headers, body: body && JSON.stringify(body), signal };
    answer = await fetch(url, { ...request, cache: "no-store" }); // a 304 would leave what was said of an answer's age
    value = await answer.json();
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw new Refused(0, "The gateway does not answer.");
  }
  if (caller !== asker) throw new Refused(0, "Somebody else is logged in.", OTHER_CALLER); // it was not for him
  compareClocks(answer.headers.get("date"), (asked + Date.now()) / 2);
  if (answer.ok && value) return { value, ageS: Number(answer.headers.get("age") ?? 0) };
  const reason = value?.details?.find((detail) => detail.reason)?.reason ?? "";
  const wait = Number(answer.headers.get("retry-after")) || 0;
  const error = new Refused(answer.status, sentence(value?.message || `HTTP ${answer.status}`), reason, wait);
  if (error.status === 401 && name !== "logIn" && caller) sessionEnded();
  throw error;
}

export function sentence(message) {
  const words = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(words) ? words : `${words}.`;
}
