# Everything needs Go and, for tests and the demo, what .ci/setup installs.

GO ?= go
# The race detector needs a C compiler.
RACE := $(if $(shell command -v gcc),-race)
# How long fuzz-short runs each fuzz target.
FUZZTIME ?= 10s
GOLANGCI_LINT := $(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v2.15.0
UNIT = $$($(GO) list ./... | grep -v /e2e$$)

.PHONY: build
build: ## bin/calf, one static binary
	CGO_ENABLED=0 $(GO) build -trimpath -o bin/calf ./cmd/calf

.PHONY: demo
demo: setup build ## boots a Linux guest from a QCOW2 image
	$(GO) run ./cmd/internal/lab/run -calf bin/calf -- examples/demo/demo.sh

.PHONY: test
test: setup vet unit e2e ## every test

.PHONY: setup
setup:
	.ci/setup

.PHONY: vet
vet:
	$(GO) vet ./...

.PHONY: unit
unit: ## the tests that boot no Linux guest
	$(GO) test $(RACE) $(UNIT)

.PHONY: e2e
e2e: setup ## the tests that boot Linux guests; RUN=regexp selects some
	$(GO) test -v -count=1 -timeout=45m -run='$(RUN)' ./cmd/calf/e2e

.PHONY: race
race:
	$(GO) test -race -count=1 $(UNIT)

.PHONY: fuzz-short
fuzz-short: ## each fuzz target for FUZZTIME
	@for pkg in $(UNIT); do \
		for target in $$($(GO) test -list '^Fuzz' $$pkg | grep '^Fuzz'); do \
			echo "$$pkg $$target"; \
			$(GO) test -run='^$$' -fuzz="^$$target$$" -fuzztime=$(FUZZTIME) $$pkg || exit 1; \
		done; \
	done

# How many states of cut-off power make crash tries.
STATES ?= 100000

.PHONY: crash
crash: ## power cuts and faults, the long run; STATES=n
	$(GO) test -run='^(TestCrash|TestFaults$$|TestModel$$)' -count=1 -timeout=2h -v ./qcow2 -args -states=$(STATES)

# What make soak passes to the command; its -help lists more.
SOAK ?= -for 1m

.PHONY: soak
soak: ## many writers on one image, every read verified; SOAK='-for 10m'
	$(GO) run ./qcow2/internal/soak $(SOAK)

.PHONY: bench
bench:
	$(GO) test -run='^$$' -bench=. -benchmem $(UNIT)

.PHONY: speed
speed: setup ## what a command in a guest costs; on hardware, held to its bounds
	CALF_SPEED=1 $(GO) test -v -count=1 -timeout=45m -run='^TestSpeed$$' ./cmd/calf/e2e

# What make image-bench passes to the command; its -help lists more.
IMAGE_BENCH ?= -rounds 7

.PHONY: image-bench
image-bench: build ## calf image beside qemu-img, as a table
	$(GO) run ./cmd/internal/imagebench -calf bin/calf $(IMAGE_BENCH)

.PHONY: lint
lint: ## formatting and linters
	@unformatted=$$(gofmt -l .); [ -z "$$unformatted" ] || { echo "not gofmt'ed:"; echo "$$unformatted"; exit 1; }
	$(GOLANGCI_LINT) run ./...

.PHONY: clean
clean:
	rm -rf bin
