// Which server is shown, and what is known and chosen of it: server-page.js and history.js fill it in.

import { ROWS_AT_ONCE } from "./elements.js";

export const RANGES = {
  "1h": { seconds: 3600, step: "10s", everyStep: "10 s", stepS: 10, everyS: 10 },
  "6h": { seconds: 21600, step: "60s", everyStep: "minute", stepS: 60, everyS: 30 },
  "24h": { seconds: 86400, step: "5m", everyStep: "5 min", stepS: 300, everyS: 60 },
  "7d": { seconds: 604800, step: "30m", everyStep: "30 min", stepS: 1800, everyS: 300 },
  "30d": { seconds: 2592000, step: "2h", everyStep: "2 h", stepS: 7200, everyS: 600 },
};

export let server = null; // null: another page is shown

export const serverHash = (id) => `#/servers/${encodeURIComponent(id)}`;

export function lookAt(id, parameters) {
  const range = parameters.get("range");
  server = {
    id, answer: null, units: new Map(), windows: [], filter: "", limit: ROWS_AT_ONCE * 3,
    metric: parameters.get("metric") ?? "", range: Object.hasOwn(RANGES, range) ? range : "1h", aggregation: "", series: null,
    found: null, foundError: "",
  };
}

export function lookAway() {
  server = null;
}

/** Of how many days its findings are listed and shaded: of all that is drawn. */
export const findingDays = () => Math.max(7, RANGES[server.range].seconds / 86_400);

/** From when to when it was not as usual, in seconds; newest first, with Infinity for the end of what goes on. */
export const shaded = () => (server.found?.anomalies ?? []).map(({ from, to }) => [from / 1000, to / 1000]);

/** The unit of a value of a finding: a counter is judged by its rate. */
export function judgedUnit(metric) {
  const { unit, counts } = server.units.get(metric) ?? { unit: "" };
  return counts ? `${unit || "1"}/s` : unit;
}

export function isCounter() {
  return server.units.get(server.metric)?.counts ?? false;
}

/** How points are put together: of a counter it is the rate that tells something, of a gauge there is none. */
export function aggregation() {
  if (server.aggregation === "RATE" && !isCounter()) return "AVG";
  return server.aggregation || (isCounter() ? "RATE" : "AVG");
}
