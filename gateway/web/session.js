// Who is there: logging in and out, and what may not stay of whoever was there before.

import { call, caller, callerIs, whenSessionEnds } from "./calls.js";
import { $, on, show, text } from "./elements.js";
import { forgetFindings } from "./findings.js";
import { forgetFleet } from "./fleet-table.js";
import { forgetLive } from "./live.js";
import { pollAnew, tick } from "./polls.js";
import { forgetProblems, problem } from "./problems.js";
import { route } from "./routing.js";
import { forgetServer } from "./server-page.js";
import { forgetStores } from "./stores.js";
import { forgetStream, openStream } from "./stream.js";
import { forgetSummary } from "./summary.js";
import { duration } from "./times-and-units.js";

const OPENID = "/auth/openid/login";
const ROLES = { ROLE_VIEWER: "viewer", ROLE_OPERATOR: "operator", ROLE_ADMIN: "administrator", ROLE_AGENT: "agent" };
// No password helps against these.
const NOT_FROM_HERE = new Set(["PEER_NOT_LOCAL", "HOST_NOT_LOCAL", "ORIGIN_FOREIGN", "PROXIED"]);

function notice(message) {
  text($("notice"), message);
  show("notice");
}

export async function start() {
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
  callerIs(answer);
  const scope = scopeWords(answer.scope);
  text($("caller-name"), [answer.name, ROLES[answer.role] ?? answer.role, ...scope].join(" · "));
  $("caller").hidden = false;
  $("log-out").hidden = !answer.csrfToken;
  $("live").hidden = false;
  openStream();
  pollAnew();
  route();
  tick();
}

/** Another tab may have logged somebody else in, and he may be allowed other things than before. */
export async function readCaller() {
  let answer;
  try {
    answer = (await call("whoAmI")).value;
  } catch {
    return; // a session that is over was told to end; what else is wrong the stream tells
  }
  if (keyOf(answer) === keyOf(caller)) return;
  leave();
  enter(answer);
}

/** What tells a caller, and what he may, from another. */
function keyOf({ name, role, scope, csrfToken }) {
  const lists = scope && [scope.environments, scope.serverRoles, scope.serverIds].map((names) => [...names].sort());
  return JSON.stringify([name, role, lists, csrfToken]);
}

function scopeWords(scope) {
  if (!scope) return [];
  const lists = [["environment", scope.environments], ["role", scope.serverRoles], ["server", scope.serverIds]];
  const given = lists.filter(([, names]) => names?.length);
  return given.map(([word, names]) => `${word} ${names.length > 3 ? `one of ${names.length}` : names.join(", ")} only`);
}

/** Nothing of what was seen stays: whoever comes next may be allowed less. */
function leave() {
  callerIs(null);
  forgetStream();
  forgetLive();
  forgetProblems();
  forgetStores();
  forgetFindings();
  forgetFleet();
  forgetSummary();
  forgetServer();
  text($("caller-name"), "");
  for (const id of ["caller", "live"]) $(id).hidden = true;
}

function sessionEnded() {
  leave();
  offerLogIn("The session has ended.");
}

async function offerLogIn(message = "") {
  document.title = "Log in – OpenManager";
  logInError(takeLogInError() || message); // a cookie of an ended session does not hide why the log-in did not work
  show("log-in");
  $("log-in-name").focus();
  try {
    const answer = await fetch(OPENID, { method: "HEAD" });
    $("openid").hidden = !answer.ok;
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

export function setUpSession() {
  whenSessionEnds(sessionEnded);
  on("log-in-form", "submit", logIn);
  on("log-out", "click", logOut);
}
