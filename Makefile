# make, make test, make install: see README.md and CONTRIBUTING.md.

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
# The target of all builds: see packaging/build-target. It is asked for when a rule first needs it, and `make install` needs none.
TARGET = $(eval TARGET := $$(shell packaging/build-target))$(TARGET)
# What `make` builds and `make install` installs.
PROGRAM := target/kmutex
# The same without the feature etcd, to see what the feature costs.
SLIM := target/kmutex-slim

BIN := $(DESTDIR)$(PREFIX)/bin
MAN := $(DESTDIR)$(PREFIX)/share/man/man1
BASH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system
TMPFILES := $(DESTDIR)$(PREFIX)/lib/tmpfiles.d

# The oldest Rust that Cargo.toml promises.
MSRV := $(shell sed -n 's/^rust-version = "\(.*\)"/\1.0/p' Cargo.toml)

.PHONY: build build-slim test test-tools lint cargo-deny advisories msrv generate check-generated bench bench-cluster bench-plot \
	check-counts counts fuzz soak install install-keyedmutexd uninstall

build:
	$(CARGO) build --release --locked --target $(TARGET)
	install -m 755 target/$(TARGET)/release/kmutex $(PROGRAM)

# In a folder of its own, so that neither build replaces what the other has compiled.
build-slim:
	$(CARGO) build --release --locked --target $(TARGET) --no-default-features --features cli --target-dir target/slim
	install -m 755 target/slim/$(TARGET)/release/kmutex $(SLIM)

# Runs all tests. Installs the tools that they use; a missing tool that cannot be installed is an error.
test: test-tools
	$(CARGO) test --locked --target $(TARGET) --features failpoints -- --include-ignored

test-tools:
	./tests/install-tools

lint: cargo-deny
	$(CARGO) fmt --check
	cd fuzz && $(CARGO) fmt --check
	cd benches && $(CARGO) fmt --check
	$(CARGO) clippy --locked --target $(TARGET) --all-targets --features failpoints -- --deny warnings
	$(CARGO) clippy --locked --target $(TARGET) --all-targets --no-default-features --features cli -- --deny warnings
	$(CARGO) clippy --locked --target $(TARGET) --lib --no-default-features --features daemon -- --deny warnings
	$(CARGO) clippy --locked --target $(TARGET) --lib --no-default-features -- --deny warnings
	cd benches && $(CARGO) clippy --locked --target $(TARGET) --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --locked --target $(TARGET) --no-deps --document-private-items
	$(CARGO) deny --locked check bans licenses sources

# Without optimization it is built sooner, and it has little to do here.
cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || \
		CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install cargo-deny --locked --version 0.20.2 --debug

# Compares the dependencies with the advisories of rustsec.org. A new advisory makes this fail without a change here.
advisories: cargo-deny
	$(CARGO) deny --locked check advisories

msrv:
	rustup run $(MSRV) rustc --version || rustup toolchain install $(MSRV) --profile minimal
	rustup run $(MSRV) cargo check --locked
	rustup run $(MSRV) cargo check --locked --lib --no-default-features

# Writes the man pages and the completions from the definition of the command line.
generate:
	KMUTEX_GENERATE=1 $(CARGO) test --quiet --locked --target $(TARGET) --test it generated::

check-generated:
	$(CARGO) test --quiet --locked --target $(TARGET) --test it generated::

# Measures times: kmutex compared with flock(1), with the least that any daemon must do, and with etcdctl, redis and bkt. Writes the
# table in docs/performance.md.
bench: build build-slim
	cd benches && $(CARGO) run --release --locked --target $(TARGET) -- run

# Only the measurements of clustered locks; needs etcd and etcdctl.
bench-cluster: build
	cd benches && $(CARGO) run --release --locked --target $(TARGET) -- cluster

# Draws the pictures of docs/performance.md from the results of `make bench`.
bench-plot:
	cd benches && $(CARGO) run --release --locked --target $(TARGET) -- plot

# Counts instructions, system calls and bytes, which are the same each time. Fails if a count has grown by more than a tenth.
check-counts: build build-slim test-tools
	cd benches && $(CARGO) run --release --locked --target $(TARGET) -- count --check

# Updates the expected counts.
counts: build build-slim test-tools
	cd benches && $(CARGO) run --release --locked --target $(TARGET) -- count

# Fuzzes each target for a minute, or for KMUTEX_FUZZ_SECS seconds.
fuzz:
	./tests/fuzz

# Runs each chaos test for an hour, or for KMUTEX_CHAOS_SECS seconds, and then hostile users for as long.
soak:
	KMUTEX_CHAOS_SECS=$${KMUTEX_CHAOS_SECS:-3600} $(CARGO) test --locked --target $(TARGET) --release --test chaos --test chaos_cluster -- \
		--include-ignored --nocapture
	KMUTEX_HOSTILE_SECS=$${KMUTEX_CHAOS_SECS:-3600} $(CARGO) test --locked --target $(TARGET) --release --features failpoints --test hostile -- \
		--include-ignored --nocapture

# Installs what `make` has built. It builds nothing, so root needs no cargo.
install:
	@test -x $(PROGRAM) || { echo "run make first: there is no $(PROGRAM)" >&2; exit 1; }
	install -d $(BIN) $(MAN) $(BASH_COMPLETIONS) $(ZSH_COMPLETIONS) $(FISH_COMPLETIONS) $(UNITS) $(TMPFILES)
	install -m 755 $(PROGRAM) $(BIN)/kmutex
	install -m 644 man/*.1 $(MAN)
	install -m 644 completions/kmutex.bash $(BASH_COMPLETIONS)/kmutex
	install -m 644 completions/_kmutex $(ZSH_COMPLETIONS)/_kmutex
	install -m 644 completions/kmutex.fish $(FISH_COMPLETIONS)/kmutex.fish
	install -m 644 packaging/systemd/kmutex.socket $(UNITS)
	install -m 644 packaging/tmpfiles.d/kmutex.conf $(TMPFILES)
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' packaging/systemd/kmutex.service > $(UNITS)/kmutex.service
	chmod 644 $(UNITS)/kmutex.service

# Also installs the name of KeyedMutex's daemon.
install-keyedmutexd: install
	ln -sf kmutex $(BIN)/keyedmutexd

uninstall:
	rm -f $(BIN)/kmutex $(BIN)/keyedmutexd $(MAN)/kmutex.1 $(MAN)/kmutex-*.1 $(BASH_COMPLETIONS)/kmutex \
		$(ZSH_COMPLETIONS)/_kmutex $(FISH_COMPLETIONS)/kmutex.fish $(UNITS)/kmutex.service $(UNITS)/kmutex.socket $(TMPFILES)/kmutex.conf
