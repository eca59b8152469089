module lorayard

go 1.26.0

require (
	github.com/MicahParks/jwkset v0.11.4 // auth: the keys that Supabase Auth publishes
	github.com/MicahParks/keyfunc/v3 v3.9.1 // auth: keeps them fresh for golang-jwt
	github.com/NVIDIA/go-nvml v0.13.3-1 // reads the GPUs; NVIDIA's own binding, fixed by the mission
	github.com/alicebob/miniredis/v2 v2.40.0 // dev stack: a Redis inside the process where none is installed
	github.com/anishathalye/porcupine v1.3.1 // tests: whether a recorded history of concurrent calls has an order
	github.com/go-json-experiment/json v1.27.2 // strict JSON by tokens, 800 MB/s; mirrors encoding/json/v2 and becomes the standard library's with Go 1.27
	github.com/golang-jwt/jwt/v5 v5.3.1 // auth: tokens of Supabase users; dev stack: tokens of the local store
	github.com/google/uuid v1.6.0 // boots, nonces and ids
	github.com/hibiken/asynq v0.26.0 // the hand-over; fixed by the mission. The gate knows this version's dequeue: a test fails when it changes
	github.com/jackc/pgx/v5 v5.12.0 // Postgres; fixed by the mission
	github.com/prometheus/client_golang v1.25.0 // metrics; fixed by the mission
	github.com/prometheus/client_model v0.6.3 // tests: what a registry gathers, as client_golang says it
	github.com/redis/go-redis/v9 v9.23.0 // Redis, and the hook that the gate is; fixed by the mission
	github.com/supabase-community/storage-go v0.8.1 // small calls to Supabase Storage; fixed by the mission
	go.opentelemetry.io/otel v1.47.0 // traces: attributes and states of spans
	go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp v1.47.0 // traces: OTLP over HTTP
	go.opentelemetry.io/otel/sdk v1.47.0 // traces: batches them, never in anybody's way
	go.opentelemetry.io/otel/trace v1.47.0 // traces: their ids
	go.opentelemetry.io/proto/otlp v1.11.0 // tests: what a collector reads
	go.uber.org/goleak v1.3.0 // tests: no goroutine is left behind
	go.yaml.in/yaml/v3 v3.0.5 // tests: reads the alerts that promtool reads
	golang.org/x/sync v0.24.0 // errgroup: goroutines that are waited for
	golang.org/x/sys v0.49.0 // what package syscall lacks: subreaper, timerfd, pidfd, cgroup, socket options
	golang.org/x/time v0.15.0 // auth: how often a stranger's key makes us ask; indirect of asynq too
	google.golang.org/protobuf v1.36.12 // tests: what a collector reads
	pgregory.net/rapid v1.3.0 // tests: properties and state machines, with shrinking
)

require (
	github.com/BurntSushi/toml v1.4.1-0.20240526193622-a339e1f7089c // indirect
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cenkalti/backoff/v5 v5.0.3 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/go-logr/logr v1.4.4 // indirect
	github.com/go-logr/stdr v1.2.2 // indirect
	github.com/grpc-ecosystem/grpc-gateway/v2 v2.30.0 // indirect
	github.com/jackc/pgpassfile v1.0.0 // indirect
	github.com/jackc/pgservicefile v0.0.0-20240606120523-5a60cdf6a761 // indirect
	github.com/jackc/puddle/v2 v2.2.3 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/prometheus/procfs v0.22.0 // indirect
	github.com/robfig/cron/v3 v3.0.1 // indirect
	github.com/spf13/cast v1.10.0 // indirect
	github.com/yuin/gopher-lua v1.1.1 // indirect
	go.opentelemetry.io/auto/sdk v1.2.1 // indirect
	go.opentelemetry.io/otel/exporters/otlp/otlptrace v1.47.0 // indirect
	go.opentelemetry.io/otel/log v1.47.0 // indirect
	go.opentelemetry.io/otel/metric v1.47.0 // indirect
	go.uber.org/atomic v1.12.0 // indirect
	golang.org/x/exp/typeparams v0.0.0-20231108232855-2478ac86f678 // indirect
	golang.org/x/mod v0.41.0 // indirect
	golang.org/x/net v0.59.0 // indirect
	golang.org/x/text v0.42.0 // indirect
	golang.org/x/tools v0.51.0 // indirect
	google.golang.org/genproto/googleapis/api v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/genproto/googleapis/rpc v0.0.0-20260928230214-8a89bd6388cc // indirect
	google.golang.org/grpc v1.83.2 // indirect
	honnef.co/go/tools v0.8.2 // indirect
	mvdan.cc/gofumpt v0.12.0 // indirect
)

tool (
	honnef.co/go/tools/cmd/staticcheck
	mvdan.cc/gofumpt
)
