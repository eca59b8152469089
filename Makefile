# Lorayard. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VERSION := $(shell git describe --always --dirty 2>/dev/null || echo development)
LDFLAGS := -s -w -X main.version=$(VERSION)
# go-nvml's header marks what newer drivers dropped; cgo repeats it on each build.
export CGO_CFLAGS := -O2 -Wno-deprecated-declarations
PYTHON = $(shell cat .data/python)
PYRIGHT = $(shell cat .data/pyright)
APP_TOOLS = $(shell cat .data/app)
PROMETHEUS = $(shell cat .data/prometheus 2>/dev/null)
TRAIN := scripts/train
BENCH ?=
DATA ?= $(TRAIN)/testdata/demo.jsonl

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

.PHONY: setup
setup: ## install what the demo needs and is missing
	@scripts/setup demo

.PHONY: build
build: ## build both binaries and the dev stack into bin/
	@echo "building bin/dispatcher, bin/agent, bin/devstack"
	@CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/dispatcher ./cmd/dispatcher
	@go build -trimpath -ldflags '$(LDFLAGS)' -o bin/agent ./cmd/agent
	@go build -trimpath -o bin/devstack ./internal/cmd/devstack

.PHONY: demo
demo: setup build ## run one real training job from inserted row to adapter (DATA=file.jsonl)
	@bin/devstack demo --bin bin --trainer-python "$(PYTHON)" --trainer-dir $(TRAIN) --data "$(DATA)"

.PHONY: demo-fleet
demo-fleet: build ## run 16 pretended GPUs with jobs and faults, and Prometheus
	@scripts/setup fleet
	@bin/devstack fleet --bin bin --trainer-python "$$(cat .data/python)" --trainer-dir $(TRAIN) --prometheus "$$(cat .data/prometheus)"

.PHONY: dev
dev: setup build ## start the whole system and stay up
	@bin/devstack dev --bin bin --trainer-python "$(PYTHON)" --trainer-dir $(TRAIN)

.PHONY: test
test: ## set up and run everything that decides whether a change lands
	@scripts/setup test
	@$(MAKE) --no-print-directory lint pytest gotest
	@echo "all checks passed"

.PHONY: lint
lint: ## format, vet, static analysis of Go and Python
	@echo "== gofumpt, go vet, staticcheck"
	@bad=$$(go tool gofumpt -l cmd deploy internal); if [[ -n $$bad ]]; then echo "not formatted (make fmt): $$bad"; exit 1; fi
	@go vet ./...
	@go tool staticcheck ./...
	@echo "== ruff, pyright"
	@cd $(TRAIN) && $(PYTHON) -m ruff check . && $(PYTHON) -m ruff format --check .
	@cd $(TRAIN) && node "$(PYRIGHT)" --pythonpath "$(PYTHON)"

.PHONY: fmt
fmt: ## format Go and Python
	@go tool gofumpt -w cmd deploy internal
	@cd $(TRAIN) && $(PYTHON) -m ruff check --fix . && $(PYTHON) -m ruff format .

.PHONY: gotest
gotest: ## Go tests against the real Postgres and Redis, with the race detector
	@echo "== go test -race"
	@TRAINER_PYTHON="$(PYTHON)" APP_TOOLS="$(APP_TOOLS)" PROMETHEUS="$(PROMETHEUS)" go test -race -p 2 -timeout 25m ./...

.PHONY: pytest
pytest: ## the trainer's tests, on the CPU
	@echo "== pytest"
	@cd $(TRAIN) && $(PYTHON) -m pytest -p no:cacheprovider

.PHONY: bench
bench: setup build ## print the benchmark tables, about 8 minutes (BENCH="--only handover --profile dir"; more: BENCH=--help)
	@go run ./internal/cmd/bench --trainer-python "$(PYTHON)" $(BENCH)

.PHONY: microbench
microbench: ## run the Go benchmarks of single rooms
	@go test -run '^$$' -bench . -benchmem ./...

.PHONY: trainbench
trainbench: setup ## the trainer beside transformers.Trainer on the CPU (BENCH="--rounds 5 --json file")
	@cd $(TRAIN) && $(PYTHON) -m bench.cpu $(BENCH)

.PHONY: clean
clean: ## remove what was built and what the demo wrote
	@rm -rf bin .data
