package example;

import static java.util.concurrent.TimeUnit.SECONDS;

import com.google.protobuf.util.Durations;
import com.google.protobuf.util.Timestamps;
import io.grpc.ChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.StatusException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.BlockingClientCall;
import io.grpc.stub.MetadataUtils;
import java.io.File;
import java.io.IOException;
import java.util.ArrayList;
import java.util.List;
import openmanager.fleet.v1.History.Series;
import openmanager.fleet.v1.MetricOuterClass.Metric;
import openmanager.fleet.v1.MetricOuterClass.MetricKind;
import openmanager.fleet.v1.MetricOuterClass.MetricRow;
import openmanager.fleet.v1.MetricOuterClass.RowError;
import openmanager.fleet.v1.MetricOuterClass.ServerDescriptor;
import openmanager.fleet.v1.Status.ServerStatus;
import openmanager.gateway.v1.Fleet.ListServersRequest;
import openmanager.gateway.v1.Fleet.ListServersResponse;
import openmanager.gateway.v1.Fleet.Server;
import openmanager.gateway.v1.Fleet.WatchFleetRequest;
import openmanager.gateway.v1.Fleet.WatchFleetResponse;
import openmanager.gateway.v1.FleetServiceGrpc;
import openmanager.gateway.v1.FleetServiceGrpc.FleetServiceBlockingV2Stub;
import openmanager.gateway.v1.History.GetServerHistoryRequest;
import openmanager.gateway.v1.HistoryServiceGrpc;
import openmanager.gateway.v1.HistoryServiceGrpc.HistoryServiceBlockingV2Stub;
import openmanager.gateway.v1.Ingest.WriteMetricsRequest;
import openmanager.gateway.v1.Ingest.WriteMetricsResponse;
import openmanager.gateway.v1.IngestServiceGrpc;
import openmanager.gateway.v1.IngestServiceGrpc.IngestServiceBlockingV2Stub;

/**
 * Shows the public API from Java: lists the servers, watches the fleet until something changes, reads the history of a
 * server, and writes a batch for a server of its own and reads it back.
 */
public final class Client {
  private static final String SELF = "example-java";
  private static final long CALL_S = 10;
  private static final long WATCH_S = 60; // servers report every 10 s unless they say otherwise

  public static void main(String[] arguments) throws InterruptedException {
    try {
      run(System.getenv().getOrDefault("OPENMANAGER_ADDRESS", "127.0.0.1:50050"));
    } catch (StatusException failure) {
      System.err.printf("%s: %s%n", failure.getStatus().getCode(), failure.getStatus().getDescription());
      System.exit(1);
    } catch (IOException | IllegalStateException failure) {
      System.err.println(failure.getMessage());
      System.exit(1);
    }
  }

  private static void run(String address) throws StatusException, InterruptedException, IOException {
    ManagedChannel channel = dial(address);
    try {
      var fleet = FleetServiceGrpc.newBlockingV2Stub(channel);
      var history = HistoryServiceGrpc.newBlockingV2Stub(channel);
      String server = list(fleet);
      watch(fleet);
      long now = System.currentTimeMillis();
      read(history, GetServerHistoryRequest.newBuilder().setServerId(server).addMetric("cpu_usage")
          .setStartTime(Timestamps.fromMillis(now - 3_600_000)).setStep(Durations.fromMinutes(1)).build());
      write(IngestServiceGrpc.newBlockingV2Stub(channel), now);
      // Without a step: the points as they were written. The end is exclusive.
      read(history, GetServerHistoryRequest.newBuilder().setServerId(SELF)
          .addMetric("cpu_usage").addMetric("sent_bytes")
          .setStartTime(Timestamps.fromMillis(now)).setEndTime(Timestamps.fromMillis(now + 1)).build());
    } finally {
      channel.shutdownNow();
    }
  }

  /** Encrypts whatever leaves this machine, so that no token is sent in the clear. */
  private static ManagedChannel dial(String address) throws IOException {
    String token = System.getenv("OPENMANAGER_TOKEN");
    String authority = System.getenv("OPENMANAGER_CA_FILE");
    ChannelCredentials transport;
    if (address.matches("(localhost|127(\\.\\d+){3}|\\[::1\\]):\\d+")) {
      transport = InsecureChannelCredentials.create();
    } else if (authority != null) {
      transport = TlsChannelCredentials.newBuilder().trustManager(new File(authority)).build();
    } else {
      transport = TlsChannelCredentials.create();
    }
    var headers = new Metadata();
    if (token != null) {
      headers.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + token);
    }
    return Grpc.newChannelBuilder(address, transport)
        .intercept(MetadataUtils.newAttachHeadersInterceptor(headers)).build();
  }

  /** Reads every page; returns the first server that reports its CPU usage. */
  private static String list(FleetServiceBlockingV2Stub fleet) throws StatusException {
    List<Server> servers = new ArrayList<>();
    var request = ListServersRequest.newBuilder();
    do {
      ListServersResponse page = fleet.withDeadlineAfter(CALL_S, SECONDS).listServers(request.build());
      servers.addAll(page.getServersList());
      request.setPageToken(page.getNextPageToken());
    } while (!request.getPageToken().isEmpty());
    System.out.printf("listed %d servers%n", servers.size());
    for (Server server : servers) {
      Double usage = server.getMetricsMap().get("cpu_usage");
      if (usage != null && server.getStatus() != ServerStatus.SERVER_STATUS_OFFLINE) {
        System.out.printf("%s is %s, cpu_usage %.1f%n", server.getId(), server.getStatus(), usage);
        return server.getId();
      }
    }
    throw new IllegalStateException("no server reports cpu_usage: start the simulator, or write some");
  }

  /** Ends with the first message after the snapshot, which of a large fleet comes in several. */
  private static void watch(FleetServiceBlockingV2Stub fleet) throws StatusException, InterruptedException {
    BlockingClientCall<?, WatchFleetResponse> stream =
        fleet.withDeadlineAfter(WATCH_S, SECONDS).watchFleet(WatchFleetRequest.getDefaultInstance());
    boolean whole = false;
    int count = 0;
    for (WatchFleetResponse message = stream.read(); message != null; message = stream.read()) {
      if (message.getSnapshot()) {
        whole = false;
        count = 0;
      }
      if (whole) {
        System.out.printf("%d servers changed, %d left%n", message.getServersCount(), message.getRemovedCount());
        stream.cancel("seen enough", null);
        return;
      }
      count += message.getServersCount();
      whole = !message.getContinues();
      if (whole) {
        System.out.printf("watching %d servers%n", count);
      }
    }
    throw new IllegalStateException("the gateway ended the stream");
  }

  private static void read(HistoryServiceBlockingV2Stub history, GetServerHistoryRequest request)
      throws StatusException {
    List<Series> answer = history.withDeadlineAfter(CALL_S, SECONDS).getServerHistory(request).getSeriesList();
    if (answer.isEmpty()) {
      throw new IllegalStateException(request.getServerId() + " has no history of " + request.getMetricList());
    }
    for (Series series : answer) {
      int count = series.getValuesCount();
      System.out.printf("read %d points of %s, %s: the last is %.1f %s%n",
          count, series.getServerId(), series.getMetric(), series.getValues(count - 1), series.getUnit());
    }
  }

  /** Returns once the points are on disk. A sender that goes on would keep the stream. */
  private static void write(IngestServiceBlockingV2Stub ingest, long now) throws StatusException, InterruptedException {
    BlockingClientCall<WriteMetricsRequest, WriteMetricsResponse> stream =
        ingest.withDeadlineAfter(CALL_S, SECONDS).writeMetrics();
    stream.write(WriteMetricsRequest.newBuilder()
        .addMetrics(Metric.newBuilder().setName("cpu_usage").setUnit("%").setKind(MetricKind.METRIC_KIND_GAUGE))
        .addMetrics(Metric.newBuilder().setName("sent_bytes").setUnit("By").setKind(MetricKind.METRIC_KIND_COUNTER))
        .addServers(ServerDescriptor.newBuilder().setServerId(SELF).setEnvironment("example").setRole("client"))
        .addRows(MetricRow.newBuilder().setServerId(SELF).setTime(Timestamps.fromMillis(now)))
        .addValues(12.5).addValues(4096).build());
    stream.halfClose();
    WriteMetricsResponse answer = stream.read();
    if (answer == null) {
      throw new IllegalStateException("the gateway ended the stream");
    }
    for (RowError fault : answer.getErrorsList()) {
      throw new IllegalStateException(fault.getField() + ": " + fault.getReason() + ": " + fault.getMessage());
    }
    System.out.printf("wrote %d points of %s%n", answer.getAcceptedPoints(), SELF);
  }
}
