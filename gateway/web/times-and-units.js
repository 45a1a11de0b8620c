// Times as they are shown, by the clock of the gateway, and quantities with their units.

export let inUtc = true;
let ahead = 0; // how far the gateway's clock is ahead of ours, in milliseconds

export function showTimesInUtc(isWanted) {
  inUtc = isWanted;
}

export const now = () => Date.now() + ahead;
const two = (number) => String(number).padStart(2, "0");

/** Ages are told by the gateway's clock, which the header gives to the second. */
export function compareClocks(date, ms) {
  const theirs = Date.parse(date ?? "") + 500;
  if (!Number.isNaN(theirs)) ahead = Math.abs(theirs - ms) > 2_000 ? theirs - ms : 0;
}

export function parts(ms) {
  const at = new Date(ms - (inUtc ? 0 : new Date(ms).getTimezoneOffset() * 60_000));
  const [date, time] = at.toISOString().split("T");
  return { date, time: time.slice(0, 8) };
}

export function zoneName(ms = now()) {
  if (inUtc) return "UTC";
  const minutes = -new Date(ms).getTimezoneOffset();
  const size = Math.abs(minutes);
  return `UTC${minutes < 0 ? "−" : "+"}${two(Math.floor(size / 60))}:${two(size % 60)}`;
}

/** Date and time, of today only the time, always with the zone. */
export function stamp(ms) {
  const { date, time } = parts(ms);
  return `${date === parts(now()).date ? "" : `${date} `}${time} ${zoneName(ms)}`;
}

export function fullStamp(ms) {
  const { date, time } = parts(ms);
  return `${date} ${time} ${zoneName(ms)}`;
}

export function duration(ms) {
  const seconds = Math.round(ms / 1000);
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86_400)} d`;
}

// Units are UCUM's. A rung of a ladder: how much it is, what it is called, from which value on it is taken.
const LADDERS = {
  __proto__: null, // a unit may be any word
  By: ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].map((name, power) => [1024 ** power, name, 1024 ** power]),
  s: [[1e-6, "µs", 0], [1e-3, "ms", 1e-3], [1, "s", 1], [60, "min", 120], [3600, "h", 7200], [86400, "d", 172800]],
  Hz: [[1, "Hz", 0], [1e3, "kHz", 1e3], [1e6, "MHz", 1e6], [1e9, "GHz", 1e9]],
  1: [[1, "", 0], [1e6, "M", 1e7], [1e9, "G", 1e10], [1e12, "T", 1e13]],
};
const PLAIN = { __proto__: null, Cel: "°C", "%": "%" };
export const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const fine = new Intl.NumberFormat("en-US", { maximumSignificantDigits: 3 });
export const extreme = new Intl.NumberFormat("en-US", { notation: "scientific", maximumSignificantDigits: 3 });

/** Whether a number has so many digits in front, or zeros behind the point, that nobody would count them. */
export const isExtreme = (value) => Math.abs(value) >= 1e15 || (value !== 0 && Math.abs(value) < 1e-9);

/** By what to divide values of up to `largest`, and what their unit is called then. */
export function scaleOf(largest, unit) {
  const [, head, tail] = /^([^/]*)(.*)$/.exec(unit);
  const ladder = LADDERS[head || "1"];
  if (!ladder) return { divisor: 1, name: PLAIN[unit] ?? unit.replace(/[{}[\]]/g, "") };
  let chosen = ladder.find(([size]) => size === 1);
  if (largest > 0) chosen = ladder.findLast(([, , from]) => largest >= from) ?? ladder[0];
  return { divisor: chosen[0], name: chosen[1] + tail };
}

export function quantity(value, unit) {
  if (typeof value !== "number") return String(value);
  const { divisor, name } = scaleOf(Math.abs(value), unit);
  const scaled = value / divisor;
  if (isExtreme(scaled)) return `${extreme.format(scaled)} ${name}`.trim();
  if (unit === "%") return `${scaled.toFixed(1)} %`;
  const digits = Math.abs(scaled) >= 100 ? whole.format(scaled) : fine.format(scaled);
  return name ? `${digits} ${name}` : digits;
}
