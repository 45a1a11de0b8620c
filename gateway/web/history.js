// The history of one metric of the server that is shown.

import { call, sentence } from "./calls.js";
import { $, on, text } from "./elements.js";
import { forgetPlot, plot } from "./plot.js";
import { pollEvery, pollSoon } from "./polls.js";
import { aggregation, isCounter, RANGES, server, serverHash, shaded } from "./shown-server.js";
import { now, quantity } from "./times-and-units.js";

export function drawAggregation() {
  const rate = $("aggregation").querySelector('[value="RATE"]');
  rate.hidden = rate.disabled = !isCounter();
  $("aggregation").value = aggregation();
}

export async function readHistory() {
  const mine = server;
  const { metric } = mine;
  if (!metric) {
    text($("plot-summary"), "It has reported no metric yet.");
    return;
  }
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
    forgetPlot($("plot"));
    text($("plot-reading"), "");
    $("plot").classList.remove("busy");
    return;
  }
  pollEvery("history", range.everyS);
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

export function drawHistory() {
  if (!server?.series || $("server").hidden) return;
  const { points, unit, everyStep, resolution } = server.series;
  const { from, to } = server.series;
  const spans = shaded().filter(([begin, end]) => begin < to && end > from);
  plot($("plot"), { ...server.series, spans });
  const values = points.map(([, value]) => value);
  const lowest = values.reduce((a, b) => Math.min(a, b), Infinity);
  const highest = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const mean = values.reduce((sum, value) => sum + value / values.length, 0); // the sum may be more than a number holds
  const figures = values.length
    ? `lowest ${quantity(lowest, unit)}, mean ${quantity(Math.min(highest, Math.max(lowest, mean)), unit)}, ` +
      `highest ${quantity(highest, unit)}; a point every ${everyStep}`
    : "";
  const width = resolution < 3600 ? `${resolution / 60} min` : `${resolution / 3600} h`;
  const rolled = resolution > 0 ? ` In part from roll-ups of ${width}.` : "";
  const missing = server.incomplete ? ` Points may be missing: ${server.incomplete} could not be asked.` : "";
  const notes = [rolled, missing, spans.length ? " Shaded: when something was abnormal." : ""].join("");
  text($("plot-summary"), `${figures ? `${sentence(figures)}` : "No points in this range."}${notes}`);
}

export function choose(change) {
  Object.assign(server, change);
  const parameters = new URLSearchParams({ metric: server.metric, range: server.range });
  history.replaceState(null, "", `${serverHash(server.id)}?${parameters}`);
  pollSoon("history", 0);
  if (change.range) pollSoon("found", 0);
}

export function forgetHistory() {
  forgetPlot($("plot"));
  text($("plot-title"), "History");
  for (const id of ["plot-summary", "plot-reading"]) text($(id), "");
}

export function setUpHistory() {
  on("plot-controls", "change", (event) => {
    if (event.target.name === "range") choose({ range: event.target.value });
    else choose({ aggregation: event.target.value });
  });
  on("plot-controls", "submit", (event) => event.preventDefault());
  new ResizeObserver(drawHistory).observe($("plot"));
}
