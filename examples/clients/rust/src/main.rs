//! Shows the public API from Rust: lists the servers, watches the fleet until something changes, reads the history of a
//! server, and writes a batch for a server of its own and reads it back.

use std::error::Error;
use std::future::Future;
use std::net::IpAddr;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{env, fs};

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};
use tonic::{Request, Status};

#[allow(dead_code)]
mod protos {
    include!(concat!(env!("OUT_DIR"), "/protos.rs"));
}
use protos::openmanager::fleet::v1::{Metric, MetricKind, MetricRow, ServerDescriptor, ServerStatus};
use protos::openmanager::gateway::v1::fleet_service_client::FleetServiceClient;
use protos::openmanager::gateway::v1::history_service_client::HistoryServiceClient;
use protos::openmanager::gateway::v1::ingest_service_client::IngestServiceClient;
use protos::openmanager::gateway::v1::{
    GetServerHistoryRequest, ListServersRequest, WatchFleetRequest, WriteMetricsRequest,
};

const SELF: &str = "example-rust";
const CALL: Duration = Duration::from_secs(10);
const WATCH: Duration = Duration::from_secs(60); // servers report every 10 s unless they say otherwise

type Failure = Box<dyn Error>;
type Service = InterceptedService<Channel, Bearer>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Err(failure) = run().await else { return ExitCode::SUCCESS };
    match failure.downcast_ref::<Status>() {
        Some(status) => eprintln!("{:?}: {}", status.code(), status.message()),
        None => eprintln!("{failure}"),
    }
    ExitCode::FAILURE
}

async fn run() -> Result<(), Failure> {
    let address = env::var("OPENMANAGER_ADDRESS").unwrap_or_else(|_| "127.0.0.1:50050".into());
    let token = env::var("OPENMANAGER_TOKEN").ok().map(|token| format!("Bearer {token}").parse()).transpose()?;
    let service = Service::new(dial(&address)?, Bearer(token));
    let mut fleet = FleetServiceClient::new(service.clone());
    let mut history = HistoryServiceClient::new(service.clone());
    let mut ingest = IngestServiceClient::new(service);

    let server = within(CALL, list(&mut fleet)).await?;
    within(WATCH, watch(&mut fleet)).await?;
    let now = UNIX_EPOCH + Duration::from_millis(UNIX_EPOCH.elapsed()?.as_millis().try_into()?);
    let last_hour = GetServerHistoryRequest {
        server_id: server,
        metric: vec!["cpu_usage".into()],
        start_time: Some((now - Duration::from_secs(3600)).into()),
        step: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
        ..Default::default()
    };
    within(CALL, read(&mut history, last_hour)).await?;
    within(CALL, write(&mut ingest, now)).await?;
    let written = GetServerHistoryRequest {
        server_id: SELF.into(),
        metric: vec!["cpu_usage".into(), "sent_bytes".into()],
        start_time: Some(now.into()),
        end_time: Some((now + Duration::from_millis(1)).into()),
        ..Default::default() // without a step: the points as they were written
    };
    within(CALL, read(&mut history, written)).await
}

/// Bounds all of a call, the messages of a stream included.
async fn within<T>(limit: Duration, call: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {limit:?}")).into()),
    }
}

/// Encrypts whatever leaves this machine, so that no token is sent in the clear.
fn dial(address: &str) -> Result<Channel, Failure> {
    let (host, _) = address.rsplit_once(':').ok_or("OPENMANAGER_ADDRESS: not host:port")?;
    let ip = host.trim_matches(['[', ']']).parse::<IpAddr>();
    if host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback()) {
        return Ok(Endpoint::from_shared(format!("http://{address}"))?.connect_lazy());
    }
    let tls = match env::var("OPENMANAGER_CA_FILE") {
        Ok(path) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(fs::read(path)?)),
        Err(_) => ClientTlsConfig::new().with_native_roots(),
    };
    Ok(Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?.connect_lazy())
}

#[derive(Clone)]
struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(token) = &self.0 {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// A request that tells the gateway how long its answer is waited for.
fn request<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Reads every page; returns the first server that reports its CPU usage.
async fn list(fleet: &mut FleetServiceClient<Service>) -> Result<String, Failure> {
    let (mut servers, mut page_token) = (Vec::new(), String::new());
    loop {
        let query = ListServersRequest { page_token, ..Default::default() };
        let page = fleet.list_servers(request(query, CALL)).await?.into_inner();
        servers.extend(page.servers);
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    println!("listed {} servers", servers.len());
    for server in servers {
        if let (Some(usage), true) = (server.metrics.get("cpu_usage"), server.status() != ServerStatus::Offline) {
            println!("{} is {}, cpu_usage {usage:.1}", server.id, server.status().as_str_name());
            return Ok(server.id);
        }
    }
    Err("no server reports cpu_usage: start the simulator, or write some".into())
}

/// Ends with the first message after the snapshot, which of a large fleet comes in several; dropping the stream cancels
/// it.
async fn watch(fleet: &mut FleetServiceClient<Service>) -> Result<(), Failure> {
    let mut stream = fleet.watch_fleet(request(WatchFleetRequest::default(), WATCH)).await?.into_inner();
    let (mut whole, mut count) = (false, 0);
    while let Some(message) = stream.message().await? {
        if message.snapshot {
            (whole, count) = (false, 0);
        }
        if whole {
            println!("{} servers changed, {} left", message.servers.len(), message.removed.len());
            return Ok(());
        }
        count += message.servers.len();
        whole = !message.continues;
        if whole {
            println!("watching {count} servers");
        }
    }
    Err("the gateway ended the stream".into())
}

async fn read(history: &mut HistoryServiceClient<Service>, query: GetServerHistoryRequest) -> Result<(), Failure> {
    let answer = history.get_server_history(request(query, CALL)).await?.into_inner();
    for series in &answer.series {
        let last = series.values.last().ok_or("a series without points")?;
        let (count, server, metric, unit) = (series.values.len(), &series.server_id, &series.metric, &series.unit);
        println!("read {count} points of {server}, {metric}: the last is {last:.1} {unit}");
    }
    if answer.series.is_empty() { Err("there is no such history".into()) } else { Ok(()) }
}

/// Returns once the points are on disk. A sender that goes on would keep the stream.
async fn write(ingest: &mut IngestServiceClient<Service>, now: SystemTime) -> Result<(), Failure> {
    let metric = |name: &str, unit: &str, kind: MetricKind| Metric {
        name: name.into(),
        unit: unit.into(),
        kind: kind.into(),
        ..Default::default()
    };
    let batch = WriteMetricsRequest {
        metrics: vec![metric("cpu_usage", "%", MetricKind::Gauge), metric("sent_bytes", "By", MetricKind::Counter)],
        servers: vec![ServerDescriptor {
            server_id: SELF.into(),
            environment: "example".into(),
            role: "client".into(),
            ..Default::default()
        }],
        rows: vec![MetricRow { server_id: SELF.into(), time: Some(now.into()) }],
        values: vec![12.5, 4096.0],
        ..Default::default()
    };
    let mut stream = ingest.write_metrics(request(tokio_stream::once(batch), CALL)).await?.into_inner();
    let answer = stream.message().await?.ok_or("the gateway ended the stream")?;
    if let Some(fault) = answer.errors.first() {
        return Err(format!("{}: {}: {}", fault.field, fault.reason, fault.message).into());
    }
    println!("wrote {} points of {SELF}", answer.accepted_points);
    Ok(())
}
