// A curve over time, as SVG, with a pointer for mouse and keyboard.

import { $, text } from "./elements.js";
import { extreme, fullStamp, inUtc, isExtreme, parts, quantity, scaleOf, zoneName } from "./times-and-units.js";

const MARGIN = { top: 24, right: 14, bottom: 26, left: 58 };
const DAY = 86_400;
const TIME_STEPS = [60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, DAY, 2 * DAY, 5 * DAY, 10 * DAY];

function svg(tag, attributes = {}, content = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (content) node.textContent = content;
  return node;
}

const LARGEST = 1e300; // nearer to the ends of what a number can be, steps and sums of steps are none any more
const SMALLEST = 1e-300;
const within = (value) => Math.max(-LARGEST, Math.min(LARGEST, value));

/** Ticks at round values around [low, high]; means of one value differ in the last digits, and are one value. */
function valueTicks(low, high) {
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const size = largest < SMALLEST ? 0 : largest;
  const raw = (size && high - low > size * 1e-12 ? high - low : size || 1) / 4; // below, counting steps would not get on
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((n) => n * power).find((n) => n >= raw);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  const decimals = Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (/^25/.test(String(step / power * 10)) ? 1 : 0));
  const ticks = [];
  for (let at = first; at <= last; at += 1) ticks.push(at * step);
  if (isExtreme(step)) return { ticks, format: (value) => (value ? extreme.format(value) : "0") };
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

export function plot(box, curve, leftMargin = MARGIN.left) {
  const { points, unit, from, to, stepS, spans } = curve;
  const width = Math.max(260, box.clientWidth);
  const height = Math.max(160, box.clientHeight);
  const inner = { width: width - leftMargin - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const values = points.map(([, value]) => within(value));
  let low = values.reduce((a, b) => Math.min(a, b), values[0] ?? 0);
  const high = values.reduce((a, b) => Math.max(a, b), values[0] ?? 1);
  if (low >= 0 && low < high / 2) low = 0; // from zero where that costs no detail
  const { divisor, name } = scaleOf(Math.max(Math.abs(low), Math.abs(high)), unit);
  const { ticks, format } = valueTicks(low / divisor, high / divisor);
  const bottom = ticks[0] * divisor;
  const top = ticks.at(-1) * divisor;
  const x = (time) => leftMargin + (Math.max(0, time - from) / (to - from)) * inner.width; // a window may begin before
  const y = (value) => MARGIN.top + (1 - (within(value) - bottom) / (top - bottom)) * inner.height;

  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const [begin, end] of spans) {
    const left = x(begin);
    const wide = Math.max(2, x(Math.min(end, to)) - left); // a minute of a month is to be seen, too
    drawing.append(svg("rect", { class: "span", x: left, y: MARGIN.top, width: wide, height: inner.height }));
  }
  const labels = [];
  for (const tick of ticks) {
    const at = Math.round(y(tick * divisor));
    drawing.append(svg("line", { class: "grid", x1: leftMargin, x2: width - MARGIN.right, y1: at, y2: at }));
    labels.push(svg("text", { x: leftMargin - 8, y: at + 4, "text-anchor": "end" }, format(tick)));
    drawing.append(labels.at(-1));
  }
  const unitLabel = svg("text", { x: leftMargin - 8, y: 12, "text-anchor": "end" }, name);
  drawing.append(unitLabel);
  const right = { x: width - MARGIN.right, "text-anchor": "end" };
  drawing.append(svg("text", { ...right, y: 12 }, `time in ${zoneName(to * 1000)}`));
  const floor = height - MARGIN.bottom;
  drawing.append(svg("line", { class: "axis", x1: leftMargin, x2: width - MARGIN.right, y1: floor, y2: floor }));
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
  const outside = -Math.min(...labels.map((label) => label.getBBox().x));
  if (outside > 0 && leftMargin === MARGIN.left) { // or 1,000,000,000 would be read as 000,000
    plot(box, curve, leftMargin + Math.ceil(outside));
    return;
  }
  if (unitLabel.getBBox().x < 0) {
    unitLabel.setAttribute("x", 0);
    unitLabel.removeAttribute("text-anchor");
  }

  let current = -1;
  const pointAt = (index, px) => {
    current = index;
    pointer.replaceChildren();
    if (index < 0) return "";
    const point = points[index];
    const isThere = px === undefined || Math.abs(x(point[0]) - px) <= Math.max(12, (stepS / (to - from)) * inner.width);
    const at = isThere ? x(point[0]) : px;
    const time = isThere ? point[0] : from + ((px - leftMargin) / inner.width) * (to - from);
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
    const isAbnormal = spans.some(([begin, end]) => begin <= time && time <= end);
    return lines.concat(isAbnormal ? "something was abnormal" : []).join(", ");
  };
  const nearest = (px) => {
    const time = from + ((px - leftMargin) / inner.width) * (to - from);
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
    if (points.length && px >= leftMargin && px <= width - MARGIN.right) pointAt(nearest(px), px);
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

/** An empty box, which answers no key and no pointer with what was drawn in it. */
export function forgetPlot(box) {
  box.replaceChildren();
  box.onpointermove = box.onpointerdown = box.onpointerleave = box.onblur = box.onkeydown = null;
}
