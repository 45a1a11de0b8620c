// The servers as they are known, and how bad is how bad.

// Percent from which a value is shown as a warning and as critical: those of fleet/health.py, as a test makes sure.
export const THRESHOLDS = { cpu_usage: [80, 95], memory_usage: [85, 95], disk_usage: [85, 95] };
export const HEADLINES = Object.keys(THRESHOLDS);
export const SEVERITY = { critical: 0, offline: 1, warning: 2, unknown: 3, healthy: 4, maintenance: 5 };

export const fleet = new Map(); // id -> what is known of the server

/** A server with what filtering and sorting want of it. */
export function known(one) {
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
