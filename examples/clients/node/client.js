// Shows the public API from Node: lists the servers, watches the fleet until something changes, reads the history of a
// server, and writes a batch for a server of its own and reads it back. The protos are read when it starts.
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const SELF = "example-node";
const CALL_MS = 10_000;
const WATCH_MS = 60_000; // servers report every 10 s unless they say otherwise

const { OPENMANAGER_ADDRESS: address = "127.0.0.1:50050", OPENMANAGER_TOKEN: token } = process.env;
const FILES = ["fleet", "history", "ingest"].map((name) => `openmanager/gateway/v1/${name}.proto`);
const includeDirs = [fileURLToPath(new URL("../../../protos", import.meta.url))];
const { openmanager } = grpc.loadPackageDefinition(loadSync(FILES, { includeDirs, defaults: true, enums: String }));
const { FleetService, HistoryService, IngestService } = openmanager.gateway.v1;

const metadata = new grpc.Metadata();
if (token) metadata.set("authorization", `Bearer ${token}`);

// Whatever leaves this machine is encrypted, so that no token is sent in the clear.
function transport() {
  if (/^(localhost|127(\.\d+){3}|\[::1\]):\d+$/.test(address)) return grpc.credentials.createInsecure();
  const authority = process.env.OPENMANAGER_CA_FILE;
  return grpc.credentials.createSsl(authority ? readFileSync(authority) : null);
}

const within = (ms) => ({ deadline: Date.now() + ms });

const timestamp = (ms) => ({ seconds: Math.floor(ms / 1000), nanos: (ms % 1000) * 1e6 });

// A unary call as a promise.
function call(client, method, request) {
  return new Promise((resolve, reject) => {
    client[method](request, metadata, within(CALL_MS), (error, answer) => (error ? reject(error) : resolve(answer)));
  });
}

// Reads every page; returns the first server that reports its CPU usage.
async function list(fleet) {
  const servers = [];
  let pageToken = "";
  do {
    const page = await call(fleet, "listServers", { pageToken });
    servers.push(...page.servers);
    pageToken = page.nextPageToken;
  } while (pageToken);
  console.log(`listed ${servers.length} servers`);
  const server = servers.find((each) => "cpu_usage" in each.metrics && each.status !== "SERVER_STATUS_OFFLINE");
  if (!server) throw new Error("no server reports cpu_usage: start the simulator, or write some");
  console.log(`${server.id} is ${server.status}, cpu_usage ${server.metrics.cpu_usage.toFixed(1)}`);
  return server.id;
}

// Ends with the first message after the snapshot, which of a large fleet comes in several.
async function watch(fleet) {
  const stream = fleet.watchFleet({}, metadata, within(WATCH_MS));
  let [isWhole, count] = [false, 0];
  for await (const message of stream) {
    if (message.snapshot) [isWhole, count] = [false, 0];
    if (isWhole) {
      console.log(`${message.servers.length} servers changed, ${message.removed.length} left`);
      break;
    }
    count += message.servers.length;
    isWhole = !message.continues;
    if (isWhole) console.log(`watching ${count} servers`);
  }
  stream.on("error", () => {}); // a cancelled stream reports itself as an error
  stream.cancel();
}

async function read(history, request) {
  const { series } = await call(history, "getServerHistory", request);
  if (series.length === 0) throw new Error(`${request.serverId} has no history of ${request.metric}`);
  for (const { serverId, metric, values, unit } of series) {
    const last = values.at(-1).toFixed(1);
    console.log(`read ${values.length} points of ${serverId}, ${metric}: the last is ${last} ${unit}`);
  }
}

// Returns once the points are on disk. A sender that goes on would keep the stream.
async function write(ingest, now) {
  const stream = ingest.writeMetrics(metadata, within(CALL_MS));
  stream.end({
    metrics: [
      { name: "cpu_usage", unit: "%", kind: "METRIC_KIND_GAUGE" },
      { name: "sent_bytes", unit: "By", kind: "METRIC_KIND_COUNTER" },
    ],
    servers: [{ serverId: SELF, environment: "example", role: "client" }],
    rows: [{ serverId: SELF, time: timestamp(now) }],
    values: [12.5, 4096],
  });
  for await (const { acceptedPoints, errors } of stream) {
    for (const { field, reason, message } of errors) throw new Error(`${field}: ${reason}: ${message}`);
    console.log(`wrote ${acceptedPoints} points of ${SELF}`);
  }
}

async function main() {
  const [fleet, history, ingest] = [FleetService, HistoryService, IngestService].map(
    (Service) => new Service(address, transport()),
  );
  const server = await list(fleet);
  await watch(fleet);
  const now = Date.now();
  const minute = { seconds: 60 };
  await read(history, { serverId: server, metric: ["cpu_usage"], startTime: timestamp(now - 3_600_000), step: minute });
  await write(ingest, now);
  // Without a step: the points as they were written. The end is exclusive.
  const metric = ["cpu_usage", "sent_bytes"];
  await read(history, { serverId: SELF, metric, startTime: timestamp(now), endTime: timestamp(now + 1) });
  for (const client of [fleet, history, ingest]) client.close();
}

main().catch((error) => {
  console.error(error.code in grpc.status ? `${grpc.status[error.code]}: ${error.details}` : error.message);
  process.exit(1);
});
