// How many servers there are of each status.

import { call, caller, OTHER_CALLER } from "./calls.js";
import { $, text } from "./elements.js";
import { live, liveState } from "./live.js";
import { problem, problemsNow } from "./problems.js";
import { reopenLater } from "./stream.js";
import { now, stamp, whole } from "./times-and-units.js";

export async function readSummary() {
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
  if (!old || !problemsNow().includes("age")) problem("age", "warning", old);
  if (["live", "old"].includes(live.state)) liveState(old ? "old" : "live");
  for (const tile of $("tiles").children) {
    const count = answer.value[tile.dataset.status || "total"];
    text(tile.firstElementChild, whole.format(count));
    tile.classList.toggle("none", count === 0 && tile.dataset.status !== "");
  }
  const critical = answer.value.critical ? `${answer.value.critical} critical – ` : "";
  if (!$("fleet").hidden) document.title = `${critical}OpenManager`;
}

export function forgetSummary() {
  for (const tile of $("tiles").children) text(tile.firstElementChild, "–");
}
