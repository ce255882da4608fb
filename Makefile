# make, make test, make install: see README.md and CONTRIBUTING.md.

PREFIX ?= /usr/local
DESTDIR ?=

CARGO ?= cargo
# .cargo/config.toml builds for the host by its name, so that is where the program is.
HOST := $(shell rustc -vV | sed -n 's/^host: //p')
PROGRAM := target/$(HOST)/release/kmutex
# Without the feature etcd, to see what it costs; in a folder of its own, so that neither is built anew each time.
SLIM := target/slim

BIN := $(DESTDIR)$(PREFIX)/bin
MAN := $(DESTDIR)$(PREFIX)/share/man/man1
BASH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/bash-completion/completions
ZSH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/zsh/site-functions
FISH_COMPLETIONS := $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
UNITS := $(DESTDIR)$(PREFIX)/lib/systemd/system

# The oldest Rust that Cargo.toml promises.
MSRV := $(shell sed -n 's/^rust-version = "\(.*\)"/\1.0/p' Cargo.toml)

.PHONY: build build-slim test test-tools lint cargo-deny advisories msrv generate check-generated bench bench-cluster bench-plot check-counts counts fuzz soak install \
	install-keyedmutexd uninstall

build:
	$(CARGO) build --release --locked

build-slim:
	$(CARGO) build --release --locked --no-default-features --features cli --target-dir $(SLIM)

# Everything, with the tools that the tests use; a tool that is missing and cannot be installed is an error.
test: test-tools
	$(CARGO) test --locked --features failpoints

test-tools:
	./tests/install-tools

lint: cargo-deny
	$(CARGO) fmt --check
	cd fuzz && $(CARGO) fmt --check
	cd benches && $(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets --features failpoints -- --deny warnings
	$(CARGO) clippy --locked --all-targets --no-default-features --features cli -- --deny warnings
	$(CARGO) clippy --locked --lib --no-default-features --features daemon -- --deny warnings
	$(CARGO) clippy --locked --lib --no-default-features -- --deny warnings
	cd benches && $(CARGO) clippy --locked --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --locked --no-deps --document-private-items
	$(CARGO) deny --locked check bans licenses sources

# Without optimization it is built in a third of the time, and it has little to do here.
cargo-deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || \
		CARGO_PROFILE_DEV_DEBUG=0 $(CARGO) install cargo-deny --locked --version 0.20.2 --debug

# Asks for the advisories of rustsec.org, so a new one fails what has passed before.
advisories: cargo-deny
	$(CARGO) deny --locked check advisories

msrv:
	rustup run $(MSRV) rustc --version || rustup toolchain install $(MSRV) --profile minimal
	rustup run $(MSRV) cargo check --locked
	rustup run $(MSRV) cargo check --locked --lib --no-default-features

# The man pages and the completions, from the definition of the command line.
generate:
	$(CARGO) run --quiet --locked --example generate .

check-generated:
	rm -rf target/generated
	$(CARGO) run --quiet --locked --example generate target/generated
	diff -r -x sections man target/generated/man
	diff -r completions target/generated/completions

# Times: kmutex beside flock(1), beside the least that any daemon must do, and beside etcdctl; the table goes to
# docs/performance.md.
bench: build build-slim
	cd benches && $(CARGO) run --release --locked -- run

# Of these, those of locks that are shared through etcd; needs etcd and etcdctl.
bench-cluster: build
	cd benches && $(CARGO) run --release --locked -- cluster

# The pictures of docs/performance.md, from what `make bench` has measured.
bench-plot:
	cd benches && $(CARGO) run --release --locked -- plot

# Instructions, system calls and bytes, which are the same each time: fails where one has grown by more than a tenth.
check-counts: build build-slim test-tools
	cd benches && $(CARGO) run --release --locked -- count --check

# Takes the counts as they are now for right.
counts: build build-slim test-tools
	cd benches && $(CARGO) run --release --locked -- count

# For a minute each; KMUTEX_FUZZ_SECS says how many seconds.
fuzz:
	./tests/fuzz

# For an hour each; KMUTEX_CHAOS_SECS says how many seconds.
soak:
	KMUTEX_CHAOS_SECS=$${KMUTEX_CHAOS_SECS:-3600} $(CARGO) test --locked --release --test chaos --test chaos_cluster -- --nocapture

# What `make` has built, and nothing else, so that it needs no cargo as root.
install:
	@test -x $(PROGRAM) || { echo "run make first: there is no $(PROGRAM)" >&2; exit 1; }
	install -d $(BIN) $(MAN) $(BASH_COMPLETIONS) $(ZSH_COMPLETIONS) $(FISH_COMPLETIONS) $(UNITS)
	install -m 755 $(PROGRAM) $(BIN)/kmutex
	install -m 644 man/*.1 $(MAN)
	install -m 644 completions/kmutex.bash $(BASH_COMPLETIONS)/kmutex
	install -m 644 completions/_kmutex $(ZSH_COMPLETIONS)/_kmutex
	install -m 644 completions/kmutex.fish $(FISH_COMPLETIONS)/kmutex.fish
	install -m 644 packaging/systemd/kmutex.socket $(UNITS)
	sed 's|/usr/local/bin/|$(PREFIX)/bin/|' packaging/systemd/kmutex.service > $(UNITS)/kmutex.service
	chmod 644 $(UNITS)/kmutex.service

# In the place of KeyedMutex's daemon.
install-keyedmutexd: install
	ln -sf kmutex $(BIN)/keyedmutexd

uninstall:
	rm -f $(BIN)/kmutex $(BIN)/keyedmutexd $(MAN)/kmutex.1 $(MAN)/kmutex-*.1 $(BASH_COMPLETIONS)/kmutex \
		$(ZSH_COMPLETIONS)/_kmutex $(FISH_COMPLETIONS)/kmutex.fish $(UNITS)/kmutex.service $(UNITS)/kmutex.socket
