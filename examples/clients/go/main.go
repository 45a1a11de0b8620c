// Command client shows the public API from Go: it lists the servers, watches the fleet until something changes, reads
// the history of a server, and writes a batch for a server of its own and reads it back.
package main

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	fleetv1 "example/openmanager/gen/openmanager/fleet/v1"
	gatewayv1 "example/openmanager/gen/openmanager/gateway/v1"
)

const (
	self         = "example-go"
	callTimeout  = 10 * time.Second
	watchTimeout = time.Minute // servers report every 10 s unless they say otherwise
)

func main() {
	if err := run(context.Background()); err != nil {
		failure := status.Convert(err)
		fmt.Fprintf(os.Stderr, "%s: %s\n", failure.Code(), failure.Message())
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	connection, err := dial(cmp.Or(os.Getenv("OPENMANAGER_ADDRESS"), "127.0.0.1:50050"))
	if err != nil {
		return err
	}
	defer connection.Close()
	fleet := gatewayv1.NewFleetServiceClient(connection)
	history := gatewayv1.NewHistoryServiceClient(connection)

	server, err := list(ctx, fleet)
	if err != nil {
		return err
	}
	if err := watch(ctx, fleet); err != nil {
		return err
	}
	now := time.Now().Truncate(time.Millisecond)
	if err := read(ctx, history, &gatewayv1.GetServerHistoryRequest{
		ServerId: server, Metric: []string{"cpu_usage"}, Step: durationpb.New(time.Minute),
		StartTime: timestamppb.New(now.Add(-time.Hour)),
	}); err != nil {
		return err
	}
	if err := write(ctx, gatewayv1.NewIngestServiceClient(connection), now); err != nil {
		return err
	}
	return read(ctx, history, &gatewayv1.GetServerHistoryRequest{ // without a step: the points as they were written
		ServerId: self, Metric: []string{"cpu_usage", "sent_bytes"},
		StartTime: timestamppb.New(now), EndTime: timestamppb.New(now.Add(time.Millisecond)),
	})
}

// dial encrypts whatever leaves this machine, so that no token is sent in the clear.
func dial(address string) (*grpc.ClientConn, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, fmt.Errorf("OPENMANAGER_ADDRESS: %w", err)
	}
	transport := credentials.NewTLS(&tls.Config{})
	if host == "localhost" || net.ParseIP(host).IsLoopback() {
		transport = insecure.NewCredentials()
	} else if authority := os.Getenv("OPENMANAGER_CA_FILE"); authority != "" {
		if transport, err = credentials.NewClientTLSFromFile(authority, ""); err != nil {
			return nil, fmt.Errorf("OPENMANAGER_CA_FILE: %w", err)
		}
	}
	options := []grpc.DialOption{grpc.WithTransportCredentials(transport)}
	if token := os.Getenv("OPENMANAGER_TOKEN"); token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer(token)))
	}
	return grpc.NewClient(address, options...)
}

type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

func (bearer) RequireTransportSecurity() bool { return false } // dial sees to it

// list reads every page and returns the first server that reports its CPU usage.
func list(ctx context.Context, fleet gatewayv1.FleetServiceClient) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	var servers []*gatewayv1.Server
	for request := (&gatewayv1.ListServersRequest{}); ; {
		page, err := fleet.ListServers(ctx, request)
		if err != nil {
			return "", err
		}
		servers = append(servers, page.Servers...)
		if request.PageToken = page.NextPageToken; request.PageToken == "" {
			break
		}
	}
	fmt.Printf("listed %d servers\n", len(servers))
	for _, server := range servers {
		usage, reported := server.Metrics["cpu_usage"]
		if reported && server.Status != fleetv1.ServerStatus_SERVER_STATUS_OFFLINE {
			fmt.Printf("%s is %s, cpu_usage %.1f\n", server.Id, server.Status, usage)
			return server.Id, nil
		}
	}
	return "", errors.New("no server reports cpu_usage: start the simulator, or write some")
}

// watch ends with the first message after the snapshot, which of a large fleet comes in several; the end of its context
// ends the stream.
func watch(ctx context.Context, fleet gatewayv1.FleetServiceClient) error {
	ctx, cancel := context.WithTimeout(ctx, watchTimeout)
	defer cancel()
	stream, err := fleet.WatchFleet(ctx, &gatewayv1.WatchFleetRequest{})
	if err != nil {
		return err
	}
	for whole, count := false, 0; ; {
		message, err := stream.Recv()
		if err != nil {
			return err
		}
		if message.Snapshot {
			whole, count = false, 0
		}
		if whole {
			fmt.Printf("%d servers changed, %d left\n", len(message.Servers), len(message.Removed))
			return nil
		}
		count += len(message.Servers)
		if whole = !message.Continues; whole {
			fmt.Printf("watching %d servers\n", count)
		}
	}
}

func read(
	ctx context.Context, history gatewayv1.HistoryServiceClient, request *gatewayv1.GetServerHistoryRequest,
) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer, err := history.GetServerHistory(ctx, request)
	if err != nil {
		return err
	}
	if len(answer.Series) == 0 {
		return fmt.Errorf("%s has no history of %v", request.ServerId, request.Metric)
	}
	for _, series := range answer.Series {
		count := len(series.Values)
		fmt.Printf("read %d points of %s, %s: the last is %.1f %s\n",
			count, series.ServerId, series.Metric, series.Values[count-1], series.Unit)
	}
	return nil
}

// write returns once the points are on disk. A sender that goes on would keep the stream.
func write(ctx context.Context, ingest gatewayv1.IngestServiceClient, now time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	stream, err := ingest.WriteMetrics(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&gatewayv1.WriteMetricsRequest{
		Metrics: []*fleetv1.Metric{
			{Name: "cpu_usage", Unit: "%", Kind: fleetv1.MetricKind_METRIC_KIND_GAUGE},
			{Name: "sent_bytes", Unit: "By", Kind: fleetv1.MetricKind_METRIC_KIND_COUNTER},
		},
		Servers: []*fleetv1.ServerDescriptor{{ServerId: self, Environment: "example", Role: "client"}},
		Rows:    []*fleetv1.MetricRow{{ServerId: self, Time: timestamppb.New(now)}},
		Values:  []float64{12.5, 4096},
	})
	if err != nil && !errors.Is(err, io.EOF) { // io.EOF: the stream has ended, and Recv says why
		return err
	}
	answer, err := stream.Recv()
	if err != nil {
		return err
	}
	for _, fault := range answer.Errors {
		return fmt.Errorf("%s: %s: %s", fault.Field, fault.Reason, fault.Message)
	}
	fmt.Printf("wrote %d points of %s\n", answer.AcceptedPoints, self)
	return stream.CloseSend()
}
