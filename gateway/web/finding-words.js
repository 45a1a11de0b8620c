// A finding in words: what was not as usual, since when, and who takes care of it. And how much is learned.

import { duration, now, quantity, stamp } from "./times-and-units.js";

/** A finding with its times as numbers, milliseconds; the end of one that goes on is Infinity. */
export function timed(one) {
  return { ...one, from: Date.parse(one.startTime), to: one.endTime ? Date.parse(one.endTime) : Infinity };
}

export const goesOn = (one) => one.to === Infinity;

/** How long the server was silent: `value` is how many seconds it was at `peakTime`. */
function silentFor(one) {
  if (typeof one.value !== "number") return ""; // not known
  const since = goesOn(one) ? Math.max(0, now() - Date.parse(one.peakTime)) : 0;
  return ` for ${duration(one.value * 1000 + since)}`;
}

export const isSilence = (one) => one.detector === "silence";

/** Whether it is of what is to come: nothing need be abnormal yet. */
export const isForeseen = (one) => one.detector === "prediction";

export function whatOf(one) {
  if (isSilence(one)) return `silent${silentFor(one)}`;
  const more = one.contributions.length - 1;
  const metrics = more > 0 ? `${one.metric} and ${more} more` : one.metric;
  if (isForeseen(one)) return ["likely to fail", metrics].filter(Boolean).join(": ");
  return metrics || one.detector;
}

export function whenOf(one) {
  return goesOn(one) ? `since ${stamp(one.from)}` : `${stamp(one.from)}, for ${duration(one.to - one.from)}`;
}

/** A value of a finding; what is not known is no number. */
export const valueOf = (value, unit) => (typeof value === "number" ? quantity(value, unit) : "–");

const VERDICTS = { ANOMALY_VERDICT_REAL: "real", ANOMALY_VERDICT_FALSE: "false" };

/** Who takes care of it, and what it was by whom. */
export function whoOf(one) {
  const judged = one.verdictRemark ? `${VERDICTS[one.verdict]}, says ${one.verdictRemark.author}` : "";
  return [one.acknowledgement?.author ?? "nobody yet", judged].filter(Boolean).join("; ");
}

/** All that was said of it, a sentence each. */
export function remarksOf(one) {
  const remark = ({ author, comment, time }, words) =>
    `${author} ${words} (${stamp(Date.parse(time))})${comment ? `: ${comment}` : "."}`;
  return [
    one.acknowledgement && remark(one.acknowledgement, "takes care of it"),
    one.verdictRemark && remark(one.verdictRemark, `says it was ${VERDICTS[one.verdict]}`),
  ].filter(Boolean);
}

/** What a list of findings tells of what it may lack; "" when that is nothing. */
export function lackOf({ learned, staleSince, partlyJudged }) {
  const away = staleSince ? `The record is away since ${stamp(Date.parse(staleSince))}: findings may be missing.` : "";
  const analytics = learned === undefined ? "Analytics does not answer: nothing new may be found." : "";
  const beyond = partlyJudged ? "Not all metrics are judged: analytics watches as many as it may." : "";
  const nothing = partlyJudged && learned === 0; // of a server none of whose metrics is judged nothing is learnt
  const learning = learned < 1 && !nothing ? `Still learning what is usual, ${Math.floor(learned * 100)} % done.` : "";
  return [away, analytics, beyond, learning].filter(Boolean).join(" ");
}
