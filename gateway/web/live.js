// Whether what is shown is live, and what is said about it.

import { $, text } from "./elements.js";
import { now, stamp } from "./times-and-units.js";

export const live = { state: "", since: 0, newsAt: 0 };

export function liveState(state, why = "") {
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

export function newsCame() {
  live.newsAt = now();
}

export function forgetLive() {
  Object.assign(live, { state: "", newsAt: 0 });
}
