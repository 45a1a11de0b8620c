// The page: who is there, the fleet as it is now, one server and its history.
//
// What must stay true: what comes from the API is only ever text (textContent), never markup; the page never claims to
// be live when it is not; a fleet of thousands is drawn a few times a second at most, and only as many rows as are
// asked for.

// What the page asks for. tests/web holds each line to the gateway's routes: verb, path and names of parameters.
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
  history: "GET /v1/servers/{server_id}/history?metric&start_time&end_time&step&aggregation",
};
const OPENID = "/auth/openid/login";

// Percent from which a value is shown as a warning and as critical: those of fleet/health.py, as a test makes sure.
const THRESHOLDS = { cpu_usage: [80, 95], memory_usage: [85, 95], disk_usage: [85, 95] };
const HEADLINES = Object.keys(THRESHOLDS);
const SEVERITY = { critical: 0, offline: 1, warning: 2, unknown: 3, healthy: 4, maintenance: 5 };
const RANGES = {
  "1h": { seconds: 3600, step: "10s", everyStep: "10 s", stepS: 10, everyS: 10 },
  "6h": { seconds: 21600, step: "60s", everyStep: "minute", stepS: 60, everyS: 30 },
  "24h": { seconds: 86400, step: "5m", everyStep: "5 min", stepS: 300, everyS: 60 },
  "7d": { seconds: 604800, step: "30m", everyStep: "30 min", stepS: 1800, everyS: 300 },
  "30d": { seconds: 2592000, step: "2h", everyStep: "2 h", stepS: 7200, everyS: 600 },
};
const ROWS_AT_ONCE = 200;
const MOST_ROWS = 1_000; // as many take 0.1 s to draw anew; who has more servers filters
const REDRAW_MS = 250;
const ANSWER_WITHIN_MS = 12_000; // the gateway itself gives up after 10 s, and says so
const SILENCE_MS = 60_000; // without any event the stream is opened anew: a dead connection may look like a quiet fleet
const HIDDEN_MS = 60_000; // a tab nobody looks at gives its connection back; a browser has six for all tabs together

// ---------------------------------------------------------------------------------------------------------- elements

const $ = (id) => document.getElementById(id);

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function element(tag, className = "", content = "") {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (content) node.textContent = content;
  return node;
}

function badge(node, word) {
  node.className = `badge ${word}`;
  text(node, word);
}

/** Makes the rows of a table those of the items, in their order. What is right already is not touched. */
function reconcile(body, items, rows, keyOf, make, update) {
  const focused = document.activeElement;
  const kept = new Set();
  let place = body.firstElementChild;
  for (const item of items) {
    const key = keyOf(item);
    kept.add(key);
    let row = rows.get(key);
    if (!row) rows.set(key, (row = make(item)));
    update(row, item);
    if (row.element === place) place = place.nextElementSibling;
    else body.insertBefore(row.element, place);
  }
  for (const [key, row] of rows) {
    if (!kept.has(key)) {
      row.element.remove();
      rows.delete(key);
    }
  }
  if (focused !== document.activeElement && body.contains(focused)) focused.focus({ preventScroll: true });
}

function fromTemplate(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

// ---------------------------------------------------------------------------------------------------- times and units

let inUtc = true;
let ahead = 0; // how far the gateway's clock is ahead of ours, in milliseconds

const now = () => Date.now() + ahead;
const two = (number) => String(number).padStart(2, "0");

function parts(ms) {
  const at = new Date(ms - (inUtc ? 0 : new Date(ms).getTimezoneOffset() * 60_000));
  const [date, time] = at.toISOString().split("T");
  return { date, time: time.slice(0, 8) };
}

function zoneName(ms = now()) {
  if (inUtc) return "UTC";
  const minutes = -new Date(ms).getTimezoneOffset();
  const size = Math.abs(minutes);
  return `UTC${minutes < 0 ? "−" : "+"}${two(Math.floor(size / 60))}:${two(size % 60)}`;
}

/** Date and time, of today only the time, always with the zone. */
function stamp(ms) {
  const { date, time } = parts(ms);
  return `${date === parts(now()).date ? "" : `${date} `}${time} ${zoneName(ms)}`;
}

function fullStamp(ms) {
  const { date, time } = parts(ms);
  return `${date} ${time} ${zoneName(ms)}`;
}

function duration(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86_400)} d`;
}

// Units are UCUM's. A rung of a ladder: how much it is, what it is called, from which value on it is taken.
const LADDERS = {
  By: ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].map((name, power) => [1024 ** power, name, 1024 ** power]),
  s: [[1e-6, "µs", 0], [1e-3, "ms", 1e-3], [1, "s", 1], [60, "min", 120], [3600, "h", 7200], [86400, "d", 172800]],
  Hz: [[1, "Hz", 0], [1e3, "kHz", 1e3], [1e6, "MHz", 1e6], [1e9, "GHz", 1e9]],
  1: [[1, "", 0], [1e6, "M", 1e7], [1e9, "G", 1e10], [1e12, "T", 1e13]],
};
const PLAIN = { Cel: "°C", "%": "%" };
const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });

/** By what to divide values of up to `largest`, and what their unit is called then. */
function scaleOf(largest, unit) {
  const [, head, tail] = /^([^/]*)(.*)$/.exec(unit);
  const ladder = LADDERS[head || "1"];
  if (!ladder) return { divisor: 1, name: PLAIN[unit] ?? unit.replace(/[{}[\]]/g, "") };
  let chosen = ladder.find(([size]) => size === 1);
  if (largest > 0) chosen = ladder.findLast(([, , from]) => largest >= from) ?? ladder[0];
  return { divisor: chosen[0], name: chosen[1] + tail };
}

function quantity(value, unit) {
  if (typeof value !== "number") return String(value);
  const { divisor, name } = scaleOf(Math.abs(value), unit);
  const scaled = value / divisor;
  if (unit === "%") return `${scaled.toFixed(1)} %`;
  const digits = Math.abs(scaled) >= 100 ? whole.format(scaled) : fine.format(scaled);
  return name ? `${digits} ${name}` : digits;
}

// -------------------------------------------------------------------------------------------------------------- calls

class Refused extends Error {
  constructor(status, message, reason = "", retryAfterS = 0) {
    super(message);
    Object.assign(this, { status, reason, retryAfterS });
  }
}

const OTHER_CALLER = "OTHER_CALLER";
let caller = null; // the answer of whoAmI or logIn; null: nobody is logged in

function address(name, values = {}) {
  const [verb, target] = CALLS[name].split(" ");
  const [template, names = ""] = target.split("?");
  const path = template.replace(/\{(\w+)\}/g, (_, field) => encodeURIComponent(values[field]));
  const query = new URLSearchParams();
  for (const each of names.split("&")) if (values[each]) query.set(each, values[each]);
  return { verb, url: String(query) ? `${path}?${query}` : path };
}

/** Asks the gateway; the answer's JSON. Throws Refused, with status 0 when there is no answer. */
async function call(name, values, body) {
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
    answer = await fetch(url, { method: verb, headers, body: body && JSON.stringify(body), signal });
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

/** Ages are told by the gateway's clock, which the header gives to the second. */
function compareClocks(date, ms) {
  const theirs = Date.parse(date ?? "") + 500;
  if (!Number.isNaN(theirs)) ahead = Math.abs(theirs - ms) > 2_000 ? theirs - ms : 0;
}

function sentence(message) {
  const words = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(words) ? words : `${words}.`;
}

// ------------------------------------------------------------------------------------------------------ who is there

const ROLES = { ROLE_VIEWER: "viewer", ROLE_OPERATOR: "operator", ROLE_ADMIN: "administrator", ROLE_AGENT: "agent" };
// No password helps against these.
const NOT_FROM_HERE = new Set(["PEER_NOT_LOCAL", "HOST_NOT_LOCAL", "ORIGIN_FOREIGN", "PROXIED"]);

function show(section) {
  for (const id of ["notice", "log-in", "fleet", "server"]) $(id).hidden = id !== section;
}

function notice(message) {
  text($("notice"), message);
  show("notice");
}

async function start() {
  try {
    enter((await call("whoAmI")).value);
  } catch (error) {
    if (error.status === 401) await offerLogIn(error.reason === "SESSION_ENDED" ? "The session has ended." : "");
    else if (NOT_FROM_HERE.has(error.reason)) notice(error.message);
    else if (error.status === 403) await offerLogIn(error.message);
    else {
      notice(`${error.message} Trying again …`);
      setTimeout(start, (error.retryAfterS || 3) * 1000);
    }
  }
}

function enter(answer) {
  caller = answer;
  const scope = scopeWords(answer.scope);
  text($("caller-name"), [answer.name, ROLES[answer.role] ?? answer.role, ...scope].join(" · "));
  $("caller").hidden = false;
  $("log-out").hidden = !answer.csrfToken;
  $("live").hidden = false;
  openStream();
  for (const poll of polls) poll.at = 0;
  route();
  tick();
}

function scopeWords(scope) {
  if (!scope) return [];
  const lists = [["environment", scope.environments], ["role", scope.serverRoles], ["server", scope.serverIds]];
  const given = lists.filter(([, names]) => names?.length);
  return given.map(([word, names]) => `${word} ${names.length > 3 ? `one of ${names.length}` : names.join(", ")} only`);
}

/** Nothing of what was seen stays: whoever comes next may be allowed less. */
function leave() {
  caller = null;
  closeStream();
  Object.assign(live, { version: "", state: "", newsAt: 0 });
  fleet.clear();
  server = null;
  storesKnown = [];
  problems.clear();
  metricRows.clear();
  view.words = [];
  $("filters").reset();
  drawProblems();
  drawStores();
  chooseStatus("");
  for (const tile of $("tiles").children) text(tile.firstElementChild, "–");
  for (const id of ["metrics", "about", "plot"]) $(id).replaceChildren();
  const said = ["caller-name", "server-title", "server-error", "plot-title", "plot-summary", "plot-reading"];
  for (const id of said) text($(id), "");
  for (const id of ["caller", "live"]) $(id).hidden = true;
}

function sessionEnded() {
  leave();
  offerLogIn("The session has ended.");
}

async function offerLogIn(message = "") {
  document.title = "Log in – OpenManager";
  logInError(message || takeLogInError());
  show("log-in");
  $("log-in-name").focus();
  try {
    const answer = await fetch(OPENID, { method: "HEAD", redirect: "manual" });
    $("openid").hidden = !(answer.ok || answer.type === "opaqueredirect");
  } catch {
    $("openid").hidden = true;
  }
}

// What the log-in with OpenID may come back with, in the address.
const LOG_IN_ERRORS = {
  IDENTITY_UNKNOWN: "The OpenID provider knows you, but you have no account here. An administrator can add one.",
  LOGIN_FAILED: "Your account here is disabled.",
  LOGIN_BUSY: "Too many log in at once. Please try again.",
  OPENID_BUSY: "Too many log in at once. Please try again.",
  OPENID_NAME_MISSING: "The OpenID provider does not tell your name. An administrator has to look into it.",
  OPENID_REFUSED: "The OpenID provider did not let you in.",
  OPENID_STATE_INVALID: "The log-in took too long, or was begun in another browser. Please try again.",
  OPENID_TOKEN_INVALID: "What the OpenID provider answered does not hold. An administrator has to look into it.",
  OPENID_UNAVAILABLE: "The OpenID provider does not answer.",
};

function takeLogInError() {
  const query = new URLSearchParams(location.search);
  const reason = query.get("login_error");
  if (reason === null) return "";
  query.delete("login_error");
  history.replaceState(null, "", `${location.pathname}${String(query) && `?${query}`}${location.hash}`);
  const known = /^[A-Z0-9_]{1,64}$/.test(reason) ? reason : "UNKNOWN"; // others could put sentences into our mouth
  return LOG_IN_ERRORS[known] ?? `Logging in with OpenID did not work (${known}).`;
}

function logInError(message) {
  text($("log-in-error"), message);
  $("log-in-error").hidden = !message;
}

async function logIn(event) {
  event.preventDefault();
  const button = $("log-in-button");
  const password = $("log-in-password");
  button.disabled = true;
  try {
    const { value } = await call("logIn", {}, { name: $("log-in-name").value, password: password.value });
    logInError("");
    enter(value);
  } catch (error) {
    logInError(error.message);
    password.focus();
    password.select();
    for (let left = error.retryAfterS; left > 0; left -= 1) {
      text(button, `Try again in ${duration(left * 1000)}`);
      await new Promise((done) => setTimeout(done, 1000));
    }
  }
  password.value = caller ? "" : password.value;
  text(button, "Log in");
  button.disabled = false;
}

async function logOut() {
  $("log-out").disabled = true;
  try {
    await call("logOut");
    leave();
    history.replaceState(null, "", "/");
    await offerLogIn();
  } catch (error) {
    if (caller) problem("log-out", "warning", `You are still logged in. ${error.message}`);
  } finally {
    $("log-out").disabled = false;
  }
}

// ---------------------------------------------------------------------------------------- what is wrong, said plainly

const problems = new Map(); // what it is about -> level and sentence

function problem(about, level, sentenceOfIt) {
  if (sentenceOfIt && caller) problems.set(about, { level, sentenceOfIt });
  else problems.delete(about);
  drawProblems();
}

function drawProblems() {
  const wanted = [...problems.values()];
  const shown = [...$("banners").children];
  const same = wanted.length === shown.length && wanted.every((one, at) => one.sentenceOfIt === shown[at].textContent);
  if (same) return; // or screen readers would say it all again
  $("banners").replaceChildren(...wanted.map((one) => element("p", `banner ${one.level}`, one.sentenceOfIt)));
}

const stores = new Map();
let storesKnown = [];

async function readStores() {
  try {
    const { value } = await call("stores");
    storesKnown = value.stores;
    problem("stores");
  } catch (error) {
    if (error.reason === OTHER_CALLER) return;
    if (error.status) problem("stores", "warning", `How the stores are is not known. ${error.message}`);
    return;
  }
  drawStores();
}

const storeKey = (store) => [store.service, store.name, store.address].join(" ");
const storeState = (store) => store.state.replace("STORE_STATE_", "").toLowerCase().replace("unspecified", "unknown");

function drawStores() {
  const ill = storesKnown.filter((store) => ["down", "degraded"].includes(storeState(store)));
  for (const about of [...problems.keys()]) {
    if (about.startsWith("store ") && !ill.some((store) => about === `store ${storeKey(store)}`)) problem(about);
  }
  for (const store of ill) {
    const since = store.since ? ` since ${stamp(Date.parse(store.since))}` : "";
    const state = storeState(store);
    const level = state === "down" && store.role !== "follower" ? "critical" : "warning";
    const why = store.lastError ? ` ${sentence(store.lastError)}` : "";
    problem(`store ${storeKey(store)}`, level, `The store ${store.name} (${store.role}) is ${state}${since}.${why}`);
  }
  const count = `${storesKnown.length} ${storesKnown.length === 1 ? "store" : "stores"}`;
  const up = storesKnown.filter((store) => storeState(store) === "up").length;
  text($("stores-summary"), up === storesKnown.length ? `${count}, all up` : `${count}, ${up} up`);
  reconcile($("stores-rows"), storesKnown, stores, storeKey, () => ({ element: fromTemplate("store-row") }), storeRow);
}

function storeRow({ element: row }, store) {
  const [name, state, since, behind, free, said] = row.children;
  text(name, `${store.name} (${store.role})`);
  badge(state.firstElementChild, storeState(store));
  text(since, store.since ? stamp(Date.parse(store.since)) : "–");
  const lag = `${whole.format(store.lagPoints)} points, ${duration(store.lagSeconds * 1000)}`;
  text(behind, store.lagPoints === "0" ? "–" : lag);
  text(free, store.diskFreeBytes === "0" ? "–" : quantity(Number(store.diskFreeBytes), "By"));
  const when = store.lastErrorTime ? ` (${stamp(Date.parse(store.lastErrorTime))})` : "";
  text(said, [store.lastError && `${store.lastError}${when}`, store.note].filter(Boolean).join(" · "));
}

// ------------------------------------------------------------------------------------------------------- live stream

const live = {
  source: null, version: "", state: "", since: 0, newsAt: 0, quietSince: 0, backoffS: 0, timer: 0, holdUntil: 0,
};

function liveState(state, why = "") {
  if (state === "broken" && live.state !== "broken") live.since = now();
  live.state = state;
  const news = live.newsAt ? ` The last news is from ${stamp(live.newsAt)}.` : "";
  const since = `The live stream is broken since ${stamp(live.since)}.${news} Trying again …`;
  const broken = [why, since].filter(Boolean).join(" ");
  $("main").classList.toggle("stale", state === "broken" || state === "old");
  const words = { connecting: "Connecting …", live: "Live", old: "Connected, but nothing is new", broken };
  $("live").className = `live ${{ live: "good", old: "old", broken: "bad" }[state] ?? ""}`;
  if (state === "broken" && !why && $("live-text").textContent.endsWith(since)) return; // the reason told before stands
  text($("live-text"), words[state]);
}

function openStream() {
  closeStream();
  if (live.state !== "broken") liveState("connecting");
  const source = new EventSource(address("watch", { after_version: live.version }).url);
  live.source = source;
  live.quietSince = Date.now();
  const heard = () => {
    live.quietSince = Date.now();
    live.backoffS = 0;
    if (live.state !== "live") liveState("live");
  };
  source.addEventListener("open", heard);
  for (const [name, take] of Object.entries(EVENTS)) {
    source.addEventListener(name, (event) => {
      live.version = event.lastEventId || live.version;
      live.newsAt = now();
      heard();
      take(JSON.parse(event.data));
      redrawSoon();
    });
  }
  source.addEventListener("error", (event) => {
    if (source !== live.source) return;
    liveState("broken", event.data ? sentence(JSON.parse(event.data).message) : "");
    if (source.readyState === EventSource.CLOSED) reopenLater(); // otherwise the browser tries again by itself
  });
}

const EVENTS = {
  snapshot() {
    fleet.clear();
    live.holdUntil = performance.now() + REDRAW_MS; // until most of it is there
  },
  server(one) {
    const before = fleet.get(one.id);
    const after = known(one);
    fleet.set(one.id, after);
    if (!before || before.category !== after.category) pollSoon(readSummary);
    if (server?.id === one.id) pollSoon(readServer);
  },
  removed({ id }) {
    fleet.delete(id);
    pollSoon(readSummary);
    if (server?.id === id) pollSoon(readServer);
  },
};

function closeStream() {
  clearTimeout(live.timer);
  live.source?.close();
  live.source = null;
}

function reopenLater() {
  closeStream();
  live.backoffS = Math.min(30, live.backoffS * 2 || 2);
  live.timer = setTimeout(async () => {
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
  }, live.backoffS * 1000);
}

// -------------------------------------------------------------------------------------------------------------- fleet

const fleet = new Map(); // id -> what is known of the server
const serverRows = new Map();
const view = { words: [], status: "", sort: "status", down: false, limit: ROWS_AT_ONCE };
let redrawn = 0;
let redrawing = false;

/** A server with what filtering and sorting want of it. */
function known(one) {
  const status = one.status.replace("SERVER_STATUS_", "").toLowerCase().replace("unspecified", "unknown");
  return {
    ...one,
    status,
    category: one.inMaintenance ? "maintenance" : status, // as the summary counts them
    observed: one.observedTime ? Date.parse(one.observedTime) : NaN,
    order: one.id.replace(/\d+/g, (digits) => digits.padStart(12, "0")), // web-9 comes before web-10
    haystack: [one.id, one.hostname, one.environment, one.role, one.location].join("\n").toLowerCase(),
  };
}

function redrawSoon() {
  if (redrawing) return;
  redrawing = true;
  const wait = Math.max(0, redrawn + REDRAW_MS - performance.now(), live.holdUntil - performance.now());
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

function drawFleet() {
  redrawing = false;
  redrawn = performance.now();
  if ($("fleet").hidden && fleet.size) return;
  const wanted = chosen();
  const drawn = wanted.slice(0, view.limit);
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
  const [, mark, host] = name.children;
  return { element: row, badge: state.firstElementChild, mark, host, environment, role, gauges, age, shows: null };
}

function fillServerRow(row, one) {
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

async function readSummary() {
  let answer;
  try {
    answer = await call("summary");
  } catch (error) {
    if (error.reason === OTHER_CALLER) return;
    if (error.status) problem("summary", "warning", `The fleet cannot be counted. ${error.message}`);
    else if (caller && live.state !== "broken") {
      liveState("broken", error.message); // the stream itself may look well for minutes when the network is gone
      reopenLater();
    }
    return;
  }
  problem("summary");
  const asOf = answer.ageS ? stamp(now() - answer.ageS * 1000) : "";
  const old = asOf && `The gateway does not hear from the cache: what is shown is from ${asOf} or before.`;
  if (!old || !problems.has("age")) problem("age", "warning", old);
  if (["live", "old"].includes(live.state)) liveState(old ? "old" : "live");
  for (const tile of $("tiles").children) {
    const count = answer.value[tile.dataset.status || "total"];
    text(tile.firstElementChild, whole.format(count));
    tile.classList.toggle("none", count === 0 && tile.dataset.status !== "");
  }
  const critical = answer.value.critical ? `${answer.value.critical} critical – ` : "";
  if (!$("fleet").hidden) document.title = `${critical}OpenManager`;
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

// --------------------------------------------------------------------------------------------------------- one server

let server = null; // what the page of the server shows; null: another page is shown
const metricRows = new Map();

const serverHash = (id) => `#/servers/${encodeURIComponent(id)}`;

function openServer(id, parameters) {
  const range = parameters.get("range");
  server = {
    id, answer: null, units: new Map(), windows: [], filter: "", limit: ROWS_AT_ONCE * 3,
    metric: parameters.get("metric") ?? "", range: RANGES[range] ? range : "1h", aggregation: "", series: null,
  };
  text($("server-title"), id);
  badge($("server-status"), fleet.get(id)?.status ?? "unknown");
  $("server-status").hidden = !fleet.has(id);
  $("server-maintenance").hidden = !fleet.get(id)?.inMaintenance;
  $("server-error").hidden = true;
  $("server-body").hidden = true;
  $("metric-filter").value = "";
  $("plot-controls").elements.range.value = server.range;
  document.title = `${id} – OpenManager`;
  show("server");
  for (const poll of polls) if (poll.ofServer) poll.at = 0;
  tick();
}

function serverError(message) {
  text($("server-error"), message);
  $("server-error").hidden = !message;
}

async function readServer() {
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
async function readUnits() {
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
  if (mine.units.get(mine.metric)?.counts) pollSoon(readHistory);
}

async function readWindows() {
  const mine = server;
  if (caller.scope) return; // the call is for those who see all servers
  try {
    mine.windows = (await call("windows", { server_id: mine.id })).value.windows;
  } catch {
    return; // those that were known stand
  }
  if (server === mine) drawAbout();
}

function drawServer() {
  const answer = server?.answer;
  if (!answer) return;
  $("server-status").hidden = false;
  badge($("server-status"), answer.status);
  $("server-maintenance").hidden = !answer.inMaintenance;
  drawAbout();
  drawMetrics();
  drawAggregation();
}

function drawAbout() {
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

function isCounter() {
  return server.units.get(server.metric)?.counts ?? false;
}

/** How points are put together: of a counter it is the rate that tells something, of a gauge there is none. */
function drawAggregation() {
  const rate = $("aggregation").querySelector('[value="RATE"]');
  rate.hidden = rate.disabled = !isCounter();
  $("aggregation").value = aggregation();
}

function aggregation() {
  if (server.aggregation === "RATE" && !isCounter()) return "AVG";
  return server.aggregation || (isCounter() ? "RATE" : "AVG");
}

async function readHistory() {
  const mine = server;
  const { metric } = mine;
  if (!metric) return;
  const range = RANGES[mine.range];
  const how = aggregation();
  const asked = [metric, mine.range, how].join(" ");
  const stillWanted = () => server === mine && asked === [mine.metric, mine.range, aggregation()].join(" ");
  $("plot").classList.add("busy");
  text($("plot-title"), `History of ${metric}`);
  const window = { server_id: mine.id, metric, start_time: `-${mine.range}`, end_time: "now" };
  try {
    const { value } = await call("history", { ...window, step: range.step, aggregation: how });
    if (!stillWanted()) return;
    const series = value.series.find((one) => one.metric === metric) ?? value.series[0];
    mine.series = curveOf(series, range, how);
    mine.incomplete = value.incomplete.join(", ");
  } catch (error) {
    if (!stillWanted()) return;
    mine.series = null;
    mine.incomplete = "";
    text($("plot-summary"), error.message);
    $("plot").replaceChildren();
    $("plot").classList.remove("busy");
    return;
  }
  polls.find((poll) => poll.task === readHistory).everyS = range.everyS;
  $("plot").classList.remove("busy");
  drawHistory();
}

function curveOf(series, range, how) {
  const points = (series?.times ?? []).map((time, at) => [time, series.values[at]]);
  const unit = series?.unit || server.units.get(server.metric)?.unit || "";
  return {
    points: points.filter(([, value]) => typeof value === "number"),
    unit: how === "RATE" ? `${unit || "1"}/s` : unit,
    to: now() / 1000, from: now() / 1000 - range.seconds, stepS: range.stepS, everyStep: range.everyStep,
    resolution: Number.parseFloat(series?.resolution ?? "0"),
  };
}

function drawHistory() {
  if (!server?.series || $("server").hidden) return;
  const { points, unit, everyStep, resolution } = server.series;
  plot($("plot"), server.series);
  const values = points.map(([, value]) => value);
  const mean = values.reduce((sum, value) => sum + value, 0) / values.length;
  const figures = values.length
    ? `lowest ${quantity(values.reduce((a, b) => Math.min(a, b)), unit)}, mean ${quantity(mean, unit)}, ` +
      `highest ${quantity(values.reduce((a, b) => Math.max(a, b)), unit)}; a point every ${everyStep}`
    : "";
  const width = resolution < 3600 ? `${resolution / 60} min` : `${resolution / 3600} h`;
  const rolled = resolution > 0 ? ` In part from roll-ups of ${width}.` : "";
  const missing = server.incomplete ? ` Points may be missing: ${server.incomplete} could not be asked.` : "";
  text($("plot-summary"), `${figures ? `${sentence(figures)}` : "No points in this range."}${rolled}${missing}`);
}

function choose(change, soon = true) {
  Object.assign(server, change);
  const parameters = new URLSearchParams({ metric: server.metric, range: server.range });
  history.replaceState(null, "", `${serverHash(server.id)}?${parameters}`);
  if (soon) pollSoon(readHistory, 0);
}

// --------------------------------------------------------------------------------------------------------------- plot

const MARGIN = { top: 24, right: 14, bottom: 26, left: 58 };
const DAY = 86_400;
const TIME_STEPS = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, DAY, 2 * DAY, 5 * DAY, 10 * DAY];

function svg(tag, attributes = {}, content = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (content) node.textContent = content;
  return node;
}

/** Ticks at round values around [low, high]. */
function valueTicks(low, high) {
  const raw = (high - low || Math.abs(high) || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (/^25/.test(String(step / power * 10)) ? 1 : 0));
  const ticks = [];
  for (let at = first; at <= last; at += 1) ticks.push(at * step);
  const format = new Intl.NumberFormat("en-US", { minimumFractionDigits: decimals, maximumFractionDigits: decimals });
  return { ticks, format: (value) => format.format(value) };
}

function timeTicks(from, to, width) {
  const step = TIME_STEPS.find((each) => ((to - from) / each) * 76 <= width) ?? 10 * DAY;
  const offset = (time) => (inUtc ? 0 : -new Date(time * 1000).getTimezoneOffset() * 60);
  const ticks = [];
  for (let at = Math.ceil((from + offset(from)) / step) * step; ; at += step) {
    const time = at - offset(at - offset(from));
    if (time > to) return ticks;
    const { date, time: clock } = parts(time * 1000);
    ticks.push([time, clock === "00:00:00" || step >= DAY ? date.slice(5) : clock.slice(0, 5)]);
  }
}

/** Where the curve is broken: at every window that has no point. */
function segmentsOf(points, stepS) {
  const gaps = points.slice(1).map(([time], at) => time - points[at][0]).sort((a, b) => a - b);
  const usual = Math.max(stepS, gaps[Math.floor(gaps.length / 2)] ?? 0); // who reports each minute has no gaps of 10 s
  const segments = [];
  points.forEach((point, at) => {
    if (at === 0 || point[0] - points[at - 1][0] > usual * 1.5) segments.push([]);
    segments.at(-1).push(point);
  });
  return segments;
}

function plot(box, { points, unit, from, to, stepS }) {
  const width = Math.max(260, box.clientWidth);
  const height = Math.max(160, box.clientHeight);
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const values = points.map(([, value]) => value);
  let low = values.reduce((a, b) => Math.min(a, b), values[0] ?? 0);
  const high = values.reduce((a, b) => Math.max(a, b), values[0] ?? 1);
  if (low >= 0 && low < high / 2) low = 0; // from zero where that costs no detail
  const { divisor, name } = scaleOf(Math.max(Math.abs(low), Math.abs(high)), unit);
  const { ticks, format } = valueTicks(low / divisor, high / divisor);
  const bottom = ticks[0] * divisor;
  const top = ticks.at(-1) * divisor;
  const x = (time) => MARGIN.left + (Math.max(0, time - from) / (to - from)) * inner.width; // a window may begin before
  const y = (value) => MARGIN.top + (1 - (value - bottom) / (top - bottom)) * inner.height;

  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const tick of ticks) {
    const at = Math.round(y(tick * divisor));
    drawing.append(svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: at, y2: at }));
    drawing.append(svg("text", { x: MARGIN.left - 8, y: at + 4, "text-anchor": "end" }, format(tick)));
  }
  drawing.append(svg("text", { x: MARGIN.left - 8, y: 12, "text-anchor": "end" }, name));
  const right = { x: width - MARGIN.right, "text-anchor": "end" };
  drawing.append(svg("text", { ...right, y: 12 }, `time in ${zoneName(to * 1000)}`));
  const floor = height - MARGIN.bottom;
  drawing.append(svg("line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: floor, y2: floor }));
  for (const [time, label] of timeTicks(from, to, inner.width)) {
    const at = Math.round(x(time));
    drawing.append(svg("line", { class: "axis", x1: at, x2: at, y1: floor, y2: floor + 4 }));
    const where = at > width - 34 ? right : { x: at, "text-anchor": "middle" };
    drawing.append(svg("text", { ...where, y: floor + 18 }, label));
  }
  const dot = ([time, value]) => ({ cx: x(time).toFixed(1), cy: y(value).toFixed(1) });
  for (const segment of segmentsOf(points, stepS)) {
    const line = segment.map((point) => Object.values(dot(point)).join(" ")).join("L");
    if (segment.length > 1) drawing.append(svg("path", { class: "curve", d: `M${line}` }));
    else drawing.append(svg("circle", { class: "lone", r: 1.8, ...dot(segment[0]) }));
  }
  const pointer = svg("g");
  drawing.append(pointer);
  box.replaceChildren(drawing);

  let current = -1;
  const pointAt = (index, px) => {
    current = index;
    pointer.replaceChildren();
    if (index < 0) return "";
    const point = points[index];
    const isThere = px === undefined || Math.abs(x(point[0]) - px) <= Math.max(12, (stepS / (to - from)) * inner.width);
    const at = isThere ? x(point[0]) : px;
    const time = isThere ? point[0] : from + ((px - MARGIN.left) / inner.width) * (to - from);
    const lines = [isThere ? quantity(point[1], unit) : "no value", fullStamp(time * 1000)];
    pointer.append(svg("line", { class: "cross", x1: at, x2: at, y1: MARGIN.top, y2: floor }));
    if (isThere) pointer.append(svg("circle", { class: "at", r: 3.5, ...dot(point) }));
    const tip = svg("g", { class: "tip" });
    const words = [svg("text", { x: 9, y: 16 }, lines[0]), svg("text", { x: 9, y: 31, class: "when" }, lines[1])];
    const frame = svg("rect", { height: 38, rx: 4 });
    tip.append(frame, ...words);
    pointer.append(tip);
    const wide = Math.ceil(Math.max(...words.map((word) => word.getComputedTextLength()))) + 18;
    frame.setAttribute("width", wide);
    const isHigh = isThere && y(point[1]) < MARGIN.top + inner.height / 2; // beside the curve, not upon it
    const left = at > width / 2 ? at - wide - 10 : at + 10;
    tip.setAttribute("transform", `translate(${left} ${isHigh ? floor - 44 : MARGIN.top + 4})`);
    return lines.join(", ");
  };
  const nearest = (px) => {
    const time = from + ((px - MARGIN.left) / inner.width) * (to - from);
    let lowest = 0;
    let highest = points.length - 1;
    while (highest - lowest > 1) {
      const middle = (lowest + highest) >> 1;
      if (points[middle][0] < time) lowest = middle;
      else highest = middle;
    }
    return time - points[lowest][0] <= points[highest][0] - time ? lowest : highest;
  };
  box.onpointermove = box.onpointerdown = (event) => {
    const px = event.clientX - box.getBoundingClientRect().left;
    if (points.length && px >= MARGIN.left && px <= width - MARGIN.right) pointAt(nearest(px), px);
    else pointAt(-1);
  };
  box.onpointerleave = () => pointAt(-1);
  box.onblur = () => pointAt(-1);
  box.onkeydown = (event) => {
    const last = points.length - 1;
    const from0 = current < 0 ? last + 1 : current;
    const target = { ArrowLeft: from0 - 1, ArrowRight: current + 1, Home: 0, End: last }[event.key];
    if (target === undefined || last < 0) return;
    event.preventDefault();
    text($("plot-reading"), pointAt(Math.min(last, Math.max(0, target))));
  };
}

// -------------------------------------------------------------------------------------------------- what happens when

const polls = [
  { task: readSummary, everyS: 5 },
  { task: readStores, everyS: 10 },
  { task: readServer, everyS: 15, ofServer: true },
  { task: readHistory, everyS: 10, ofServer: true, whenFound: true },
  { task: readUnits, everyS: 600, ofServer: true, whenFound: true },
  { task: readWindows, everyS: 60, ofServer: true, whenFound: true },
].map((poll) => ({ ...poll, at: 0, running: false }));

/** Asks within a second, or at once, but never twice at the same time. */
function pollSoon(task, waitMs = 1000) {
  const poll = polls.find((each) => each.task === task);
  poll.at = Math.min(poll.at, Date.now() + waitMs);
  if (waitMs === 0) tick();
}

async function run(poll) {
  poll.running = true;
  poll.at = Infinity;
  try {
    await poll.task();
  } finally {
    poll.running = false;
    poll.at = Math.min(poll.at, Date.now() + poll.everyS * 1000);
  }
}

function tick() {
  if (!caller || document.hidden) return;
  for (const poll of polls) {
    const isWanted = (!poll.ofServer || server) && (!poll.whenFound || server.answer);
    if (isWanted && !poll.running && Date.now() >= poll.at) run(poll);
  }
}

function everySecond() {
  tick();
  if (!caller || document.hidden) return;
  if (!$("fleet").hidden) serverRows.forEach(fillAge);
  if (!$("server").hidden) drawAbout();
  if (live.source && Date.now() - live.quietSince > SILENCE_MS) openStream();
}

function route() {
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
  server = null;
  document.title = "OpenManager";
  show("fleet");
  drawFleet();
  pollSoon(readSummary, 0);
}

function onHashChange() {
  if (!caller) return;
  route();
  window.scrollTo(0, 0);
  $(server ? "server-title" : "fleet-title").focus({ preventScroll: true });
}

let hiding = 0;

function onVisibility() {
  clearTimeout(hiding);
  if (document.hidden) hiding = setTimeout(closeStream, HIDDEN_MS);
  else if (caller) {
    if (!live.source) openStream();
    tick();
  }
}

function chooseZone(zone) {
  inUtc = zone !== "local";
  $("zone").value = inUtc ? "utc" : "local";
  serverRows.forEach((row) => { row.shows = null; });
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
  const on = (id, event, act) => $(id).addEventListener(event, act);
  on("skip", "click", (event) => {
    event.preventDefault(); // the address says which page is shown
    $("main").focus();
  });
  on("log-in-form", "submit", logIn);
  on("log-out", "click", logOut);
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
  on("metric-filters", "submit", (event) => event.preventDefault());
  on("metric-filter", "input", (event) => {
    server.filter = event.target.value;
    if (server.answer) drawMetrics();
  });
  on("more-metrics", "click", () => {
    server.limit += ROWS_AT_ONCE * 3;
    drawMetrics();
  });
  on("metrics", "click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    choose({ metric: button.dataset.metric, aggregation: "" });
    drawMetrics();
    drawAggregation();
    $("plot-title").scrollIntoView({ block: "nearest" });
  });
  on("plot-controls", "change", (event) => {
    if (event.target.name === "range") choose({ range: event.target.value });
    else choose({ aggregation: event.target.value });
  });
  on("plot-controls", "submit", (event) => event.preventDefault());
  on("zone", "change", (event) => chooseZone(remembered(event.target.value) ?? "utc"));
  window.addEventListener("hashchange", onHashChange);
  document.addEventListener("visibilitychange", onVisibility);
  window.addEventListener("pagehide", closeStream);
  window.addEventListener("pageshow", (event) => event.persisted && onVisibility());
  new ResizeObserver(drawHistory).observe($("plot"));
  setInterval(everySecond, 1000);
}

listen();
drawSorting();
chooseZone(remembered() ?? "utc");
start();
